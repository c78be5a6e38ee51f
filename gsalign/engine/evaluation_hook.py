"""EvaluationHook: evaluates a training network now and then, and keeps the best weights."""

from __future__ import annotations

import logging
import math

from gsalign.engine.config import NO_SELECTION, VALIDATION
from gsalign.engine.distributed import share_buffers
from gsalign.engine.testing import embed_splits
from gsalign.engine.trainer import Hook, Trainer
from gsalign.errors import DataError
from gsalign.evaluation import EvaluationResult, Features, compare, evaluate_features
from gsalign.evaluation.protocols import validation_protocols
from gsalign.evaluation.report import results_table
from gsalign.evaluation.verification import calibrate_threshold
from gsalign.model import save_weights

logger = logging.getLogger(__name__)


class EvaluationHook(Hook):
    """Evaluates every ``training.evaluate_every`` epochs (or iterations) and at the end.

    The test protocols are always evaluated, the validation split too where there is one, and then
    an open-set threshold calibrated on it and tried on the test is recorded. Weights
    become ``model_best`` as ``training.select_on`` says: the last ones, or those with the best
    ``training.select_by`` on the validation split (protocol ``all``) or on a test protocol.
    """

    def before_run(self, trainer: Trainer) -> None:
        """Make up for an evaluation during which the resumed run was stopped."""
        if self._due(trainer) and trainer.progress.evaluated != trainer.progress.iteration:
            self._evaluate(trainer)

    def after_iteration(self, trainer: Trainer) -> None:
        """Evaluate when it is time."""
        if self._due(trainer):
            self._evaluate(trainer)

    @staticmethod
    def _due(trainer: Trainer) -> bool:
        done = trainer.progress.iteration
        period = trainer.in_iterations(trainer.config.training.evaluate_every)
        return done > 0 and (done == trainer.total or (period > 0 and done % period == 0))

    def _evaluate(self, trainer: Trainer) -> None:
        trainer.check_losses()
        share_buffers(trainer.accelerator, trainer.network)
        splits = {"test": (trainer.dataset.query, trainer.dataset.gallery)}
        protocols = {"test": trainer.dataset.protocols}
        if trainer.validation is not None:
            splits = {VALIDATION: trainer.validation, **splits}
            protocols[VALIDATION] = validation_protocols(trainer.dataset.protocols)
        done = trainer.progress.iteration
        results: dict[str, dict[str, EvaluationResult]] = {}
        features: dict[str, tuple[Features, Features]] = {}
        for name, (query, gallery) in splits.items():
            with trainer.interruptible():
                features[name] = embed_splits(
                    trainer.network,
                    query,
                    gallery,
                    trainer.config.data,
                    trainer.accelerator,
                    report=trainer.display.testing,
                )
                results[name] = evaluate_features(*features[name], protocols=protocols[name])
            label = trainer.dataset.name if name == "test" else f"{trainer.dataset.name} {name}"
            logger.info(
                "%s",
                trainer.display.as_text(
                    results_table(results[name], dataset=label, title=f"iteration {done}")
                ),
            )
            if trainer.recorder is not None:
                epoch = round(done / trainer.epoch_length, 4)
                record = {"iteration": done, "epoch": epoch, "split": name}
                if name == "test" and VALIDATION in features:
                    record["threshold"] = _threshold(features, protocols["test"])
                trainer.recorder.evaluation(record, results[name])
        trainer.progress.evaluated = done
        self._select(trainer, results)
        trainer.stopwatch.restart()

    @staticmethod
    def _select(trainer: Trainer, results: dict[str, dict[str, EvaluationResult]]) -> None:
        training, progress = trainer.config.training, trainer.progress
        if training.select_on == NO_SELECTION:
            value = None
        else:
            on_validation = training.select_on == VALIDATION
            split, protocol = (VALIDATION, "all") if on_validation else ("test", training.select_on)
            value = float(getattr(results[split][protocol], training.select_by))
            if math.isnan(value):
                logger.warning("%s on %s has no valid query", training.select_by, protocol)
                return
            if progress.best is not None and value <= progress.best:
                return
            where = "the validation split" if on_validation else f"test protocol {protocol}"
            logger.info("best so far: %s %.2f on %s", training.select_by, 100 * value, where)
        progress.best, progress.best_iteration = value, progress.iteration
        if trainer.accelerator.is_main_process:
            save_weights(trainer.network, trainer.folder.best)


def _threshold(
    features: dict[str, tuple[Features, Features]], protocols: tuple[str, ...]
) -> dict[str, object] | None:
    """The open-set threshold from the validation split; None if too few pairs give none."""
    tests = [compare(*features["test"], name) for name in protocols]
    try:
        return calibrate_threshold(compare(*features[VALIDATION], "all"), tests).as_dict()
    except DataError as error:
        logger.info("%s", error)
        return None
