"""Hook: what a trainer calls beside the optimisation; logging, evaluation and saving are hooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gsalign.engine.trainer import Trainer


class Hook:
    """Something a trainer calls; override what you need.

    A trainer's hooks are called in their order, on every process, and see the trainer's
    attributes: ``progress.iteration`` (iterations done), ``network``, the ``losses`` of the last
    iteration, ``lr``, ``folder``, ``accelerator``, ...
    """

    def before_run(self, trainer: Trainer) -> None:
        """Called once, when everything is in place and a resumed state is loaded."""

    def after_iteration(self, trainer: Trainer) -> None:
        """Called after every iteration."""

    def after_run(self, trainer: Trainer) -> None:
        """Called once, after the last iteration; not when the run is stopped before it."""

    def close(self, trainer: Trainer) -> None:
        """Called at the very end, whether the run finished, was stopped or failed."""
