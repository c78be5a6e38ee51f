"""What changes in the course of a run, by iteration: no state, so nothing to save or to resume."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gsalign.engine.config import OptimizerConfig, ScheduleConfig


def warmup_length(given: float, total: int) -> int:
    """Iterations of a warm-up given as their number or, below 1, as a share of the run's."""
    return round(given * total) if given < 1 else round(given)


@dataclass(frozen=True)
class Rise:
    """From 0 at iteration 0 to 1 in a line.

    Attributes:
        length: iterations until 1 or, below 1, the share of the run that they are; 0: 1 throughout.
        total: iterations of the run.
    """

    length: float
    total: int

    def __call__(self, iteration: int) -> float:
        """How much has risen in an iteration, counted from 0."""
        length = warmup_length(self.length, self.total)
        return iteration / length if iteration < length else 1.0


@dataclass(frozen=True)
class Schedule:
    """A linear warm-up by iterations, then a cosine by epochs or by iterations.

    Iterations count from 0. During the warm-up of W iterations the rate is ``peak`` times a factor
    that rises linearly from ``warmup_start`` at iteration 0 to 1 at iteration W. The cosine by
    iterations runs from ``peak`` at iteration W to ``minimum`` where the run ends. The cosine by
    epochs starts with the first epoch that lies after the warm-up as a whole and moves at the
    start of each epoch; what is left of the epoch in which the warm-up ended runs at ``peak``.

    Attributes:
        config: shape of the schedule.
        peak: learning rate after the warm-up.
        total: iterations of the run.
        epoch_length: iterations of an epoch.
    """

    config: ScheduleConfig
    peak: float
    total: int
    epoch_length: int

    @property
    def warmup(self) -> int:
        """Iterations of the warm-up."""
        return warmup_length(self.config.warmup, self.total)

    def __call__(self, iteration: int) -> float:
        """The learning rate of an iteration, counted from 0."""
        warmup = self.warmup
        if iteration < warmup:
            start = self.config.warmup_start
            return self.peak * (start + (1.0 - start) * iteration / warmup)
        if self.config.name == "constant":
            return self.peak
        if self.config.step == "iteration":
            done, length = iteration - warmup, self.total - warmup
        else:
            first = math.ceil(warmup / self.epoch_length)
            done = iteration // self.epoch_length - first
            length = math.ceil(self.total / self.epoch_length) - first
        progress = min(max(done / length, 0.0), 1.0) if length > 0 else 0.0
        minimum = min(self.config.minimum, self.peak)
        return minimum + (self.peak - minimum) * 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class LtpsFactor:
    """What the learning rate of every LTPS is multiplied by, as a function of the iteration.

    Attributes:
        config: the factor, and the warm-up over which it rises in a line from 0.
        total: iterations of the run.
    """

    config: OptimizerConfig
    total: int

    def __call__(self, iteration: int) -> float:
        """The factor in an iteration, counted from 0."""
        risen = Rise(self.config.ltps_warmup, self.total)
        return self.config.ltps_lr_factor * risen(iteration)
