"""A trainer with the hooks that every run has: logging, evaluation, checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gsalign.data import ReIDDataset
from gsalign.engine.checkpoint_hook import CheckpointHook
from gsalign.engine.display import Display
from gsalign.engine.evaluation_hook import EvaluationHook
from gsalign.engine.log_hook import LogHook
from gsalign.engine.trainer import Hook, Trainer

if TYPE_CHECKING:
    from gsalign.config import Config


def build_trainer(
    config: Config,
    dataset: ReIDDataset | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    hooks: Sequence[Hook] = (),
    display: Display | None = None,
) -> Trainer:
    """What ``gsalign train`` trains with; arguments and errors as those of ``Trainer``.

    Args:
        config: all settings.
        dataset: the images; read as ``config.data`` says when None.
        resume: go on from the state in the run's folder.
        overwrite: replace a run that is in the folder already.
        hooks: called after the usual ones, in this order.
        display: shows the progress.
    """
    usual = (LogHook(), EvaluationHook(), CheckpointHook())
    return Trainer(
        config,
        dataset,
        resume=resume,
        overwrite=overwrite,
        hooks=(*usual, *hooks),
        display=display,
    )
