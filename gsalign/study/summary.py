"""Means over seeds, their spread, and the paired difference from the baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from gsalign.study.rows import StudyRow


@dataclass(frozen=True)
class Spread:
    """Mean and spread of a sample.

    Attributes:
        mean: NaN of nothing.
        std: standard deviation with n - 1; NaN of fewer than two values.
        count: n.
    """

    mean: float
    std: float
    count: int

    @property
    def half_width(self) -> float:
        """Half of the 95 % confidence interval of the mean (Student's t); NaN below two values."""
        if self.count < 2:
            return math.nan
        return float(stdtrit(self.count - 1, 0.975)) * self.std / math.sqrt(self.count)

    @property
    def differs_from_zero(self) -> bool:
        """Whether that interval leaves out 0."""
        return abs(self.mean) > self.half_width


@dataclass(frozen=True)
class Summary:
    """What the seeds of one variant gave by one protocol.

    Attributes:
        protocol: its name.
        variant: its name.
        figures: by metric, over all seeds of the variant.
        gains: by metric, the variant less the baseline of the same seed, over the seeds that both
            have; empty for the baseline.
    """

    protocol: str
    variant: str
    figures: dict[str, Spread]
    gains: dict[str, Spread]


def spread(values: Sequence[float]) -> Spread:
    """Mean and spread of values; NaN among them is left out."""
    array = np.asarray(values, dtype=np.float64)
    array = array[~np.isnan(array)]
    count = array.size
    mean = float(array.mean()) if count else math.nan
    return Spread(mean, float(array.std(ddof=1)) if count > 1 else math.nan, count)


def paired_spread(ours: dict[int, float], theirs: dict[int, float]) -> Spread:
    """Spread of the differences ours - theirs, over the seeds that both have.

    Args:
        ours: figure by seed.
        theirs: figure by seed.
    """
    return spread([ours[seed] - theirs[seed] for seed in ours if seed in theirs])


def summarise(
    rows: Sequence[StudyRow],
    *,
    baseline: str,
    metrics: Sequence[str],
    protocols: Sequence[str] = (),
) -> list[Summary]:
    """Sum the ends of the runs up, by protocol and variant in the order of the rows.

    Args:
        rows: of the table.
        baseline: the variant that the others are compared with.
        metrics: the figures to sum up.
        protocols: these only, in this order; all if empty.
    """
    final = [row for row in rows if row.is_final]
    summaries = []
    for protocol in protocols or dict.fromkeys(row.protocol for row in final):
        found: dict[str, dict[int, dict[str, float]]] = {}
        for row in final:
            if row.protocol == protocol:
                found.setdefault(row.variant, {})[row.seed] = row.figures

        def by_seed(
            variant: str, metric: str, found: dict[str, dict[int, dict[str, float]]] = found
        ) -> dict[int, float]:
            return {seed: figures[metric] for seed, figures in found.get(variant, {}).items()}

        for variant in found:
            ours = {metric: by_seed(variant, metric) for metric in metrics}
            gains = {m: paired_spread(ours[m], by_seed(baseline, m)) for m in metrics}
            summaries.append(
                Summary(
                    protocol=protocol,
                    variant=variant,
                    figures={m: spread(list(ours[m].values())) for m in metrics},
                    gains={} if variant == baseline else gains,
                )
            )
    return summaries
