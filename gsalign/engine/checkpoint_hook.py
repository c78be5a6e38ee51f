"""CheckpointHook: saves the state of a run now and then, and its weights at the end."""

from __future__ import annotations

import logging

from gsalign.engine.trainer import Hook, Trainer
from gsalign.model import save_weights

logger = logging.getLogger(__name__)


class CheckpointHook(Hook):
    """Saves every ``training.checkpoint_every`` epochs (or iterations), and at the end."""

    def after_iteration(self, trainer: Trainer) -> None:
        """Save when it is time."""
        period = trainer.in_iterations(trainer.config.training.checkpoint_every)
        done = trainer.progress.iteration
        if done == trainer.total or (period and done % period == 0):
            trainer.save()
            trainer.stopwatch.restart()

    def after_run(self, trainer: Trainer) -> None:
        """Write the weights of the last iteration."""
        if trainer.accelerator.is_main_process:
            save_weights(trainer.network, trainer.folder.final)
        logger.info("wrote %s and %s", trainer.folder.best, trainer.folder.final)
