"""LogHook: reads losses, speed and angles now and then, and writes them down."""

from __future__ import annotations

import logging

from gsalign.engine.meters import peak_memory
from gsalign.engine.metrics import Record
from gsalign.engine.recorder import angle_line, train_line
from gsalign.engine.trainer import Hook, Trainer

logger = logging.getLogger(__name__)


class LogHook(Hook):
    """Writes a ``train`` record every ``training.log_every`` iterations and at the end."""

    def after_iteration(self, trainer: Trainer) -> None:
        """Keep the losses; read and write them when it is time."""
        done = trainer.progress.iteration
        trainer.meter.add(done - 1, trainer.losses)
        trainer.display.advance(done)
        accelerator = trainer.accelerator
        if done % trainer.config.training.log_every == 0 or done == trainer.total:
            self._write(trainer)
        elif accelerator.device.type == "cpu" and accelerator.num_processes == 1:
            # Looking costs nothing on a CPU, so a loss that goes wrong is found at once.
            trainer.meter.check_last()

    def _write(self, trainer: Trainer) -> None:
        losses = trainer.meter.read(trainer.loss_rows())
        seconds, waiting = trainer.stopwatch.read()
        angles = trainer.angles.read()
        done = trainer.progress.iteration
        record: Record = {
            "iteration": done,
            "epoch": round(done / trainer.epoch_length, 4),
            "total_loss": sum(losses.values()),
            "losses": losses,
            "lr": trainer.lr,
            "time": round(seconds, 6),
            "data_time": round(waiting, 6),
            "max_mem": peak_memory(trainer.accelerator.device),
        }
        epochs = trainer.total / trainer.epoch_length
        logger.info(train_line(record, total=trainer.total, epochs=epochs))
        if angles:
            logger.info(angle_line(angles))
        if done > trainer.schedule.warmup:
            # Angles start near 0, and need some steps at a rate worth the name to leave it.
            trainer.angles.warn(angles)
        trainer.display.losses(record)
        if trainer.recorder is not None:
            trainer.recorder.train(record, angles)
