"""Average precision, INP and CMC from the ranks of the positives, and the result of a protocol."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gsalign.evaluation.figures import in_percent

MAX_RANK = 50


def average_precision(ranks: ArrayLike) -> float:
    """Return the mean over the positives of (positives so far / rank).

    Args:
        ranks: ranks of the positives, from 1, ascending, at least one.
    """
    array = np.asarray(ranks, dtype=np.float64)
    # cumsum adds from left to right, as the compiled ranker does; sum() would group the terms.
    return float(np.cumsum(np.arange(1, array.size + 1) / array)[-1] / array.size)


def inverse_negative_penalty(ranks: ArrayLike) -> float:
    """Return INP, the number of positives / the rank of the last one.

    Args:
        ranks: ranks of the positives, from 1, ascending, at least one.
    """
    array = np.asarray(ranks)
    return float(array.size / array[-1])


def cumulative_matching(first_ranks: ArrayLike, max_rank: int = MAX_RANK) -> NDArray[np.float64]:
    """Return the CMC curve: the share of queries whose first positive is at rank k or better.

    Args:
        first_ranks: rank of the first positive of every valid query, from 1.
        max_rank: length of the curve.

    Returns:
        ``[max_rank]``, entry 0 for rank 1; NaN where there are no queries.
    """
    array = np.asarray(first_ranks, dtype=np.int64)
    if not array.size:
        return np.full(max_rank, np.nan)
    hits = np.bincount(array[array <= max_rank], minlength=max_rank + 1)[1:]
    curve: NDArray[np.float64] = np.cumsum(hits) / array.size
    return curve


@dataclass(frozen=True)
class EvaluationResult:
    """What a protocol gave: per query, and over all queries. Shares are in 0 .. 1.

    Attributes:
        protocol: its name.
        query_indices: place in the whole query of each query of the protocol, int64 ``[Q]``.
        num_positives: positives of each query in the gallery, int64 ``[Q]``; 0 if it is not valid.
        first_rank: rank of the first positive, from 1, int64 ``[Q]``; 0 if there is none.
        average_precision: AP of each query, ``[Q]``; NaN if it has no positive.
        inp: INP of each query, ``[Q]``; NaN if it has no positive.
        num_gallery: images in the gallery of the protocol.
        max_rank: length of the CMC curve.
    """

    protocol: str
    query_indices: NDArray[np.int64]
    num_positives: NDArray[np.int64]
    first_rank: NDArray[np.int64]
    average_precision: NDArray[np.float64]
    inp: NDArray[np.float64]
    num_gallery: int
    max_rank: int = MAX_RANK

    @property
    def valid(self) -> NDArray[np.bool_]:
        """Which queries have a positive and so count, ``[Q]``."""
        return self.num_positives > 0

    @property
    def num_queries(self) -> int:
        """Queries that the protocol asks."""
        return int(self.num_positives.size)

    @property
    def num_valid_queries(self) -> int:
        """Queries that have a positive; the figures are means over these."""
        return int(self.valid.sum())

    @property
    def cmc(self) -> NDArray[np.float64]:
        """The CMC curve, ``[max_rank]``; entry 0 is Rank-1."""
        return cumulative_matching(self.first_rank[self.valid], self.max_rank)

    def rank(self, k: int) -> float:
        """Return Rank-k, the share of valid queries with a positive among the first k.

        Raises:
            ValueError: ``k`` is not in 1 .. ``max_rank``.
        """
        if not 1 <= k <= self.max_rank:
            raise ValueError(f"k is {k}; the CMC curve runs from 1 to {self.max_rank}")
        return float(self.cmc[k - 1])

    @property
    def rank1(self) -> float:
        """Rank-1."""
        return self.rank(1)

    # The names of the literature.
    @property
    def mAP(self) -> float:
        """Mean average precision."""
        return self._mean(self.average_precision)

    @property
    def mINP(self) -> float:
        """Mean inverse negative penalty."""
        return self._mean(self.inp)

    @property
    def metric(self) -> float:
        """Return (mAP + Rank-1) / 2, by which checkpoints are compared."""
        return (self.mAP + self.rank1) / 2

    def _mean(self, values: NDArray[np.float64]) -> float:
        return float(values[self.valid].mean()) if self.num_valid_queries else float("nan")

    def as_dict(self) -> dict[str, float | int | None]:
        """Return the summary in percent, for ``metrics.json``; figures that are not there: None."""
        figures = {
            **{f"Rank-{k}": self.rank(k) for k in (1, 5, 10) if k <= self.max_rank},
            "mAP": self.mAP,
            "mINP": self.mINP,
            "metric": self.metric,
        }
        summary = in_percent(figures)
        summary["queries"] = self.num_queries
        summary["valid_queries"] = self.num_valid_queries
        summary["gallery"] = self.num_gallery
        return summary
