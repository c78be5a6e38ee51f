"""Same person or not, decided by a threshold on the distance: ROC, error rates, calibration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gsalign.errors import DataError
from gsalign.evaluation.comparison import Comparison
from gsalign.evaluation.figures import in_percent

FALSE_POSITIVE_RATES = (1e-1, 1e-2, 1e-3, 1e-4)


@dataclass(frozen=True)
class ErrorRates:
    """What a threshold does. Rates are in 0 .. 1, NaN where there is no pair.

    Attributes:
        threshold: pairs at most this far apart are taken for one person.
        false_accept: share of the pairs of two people that are.
        false_reject: share of the pairs of one person that are not.
        positives: pairs of one person.
        negatives: pairs of two people.
    """

    threshold: float
    false_accept: float
    false_reject: float
    positives: int
    negatives: int

    def as_dict(self) -> dict[str, float | int | None]:
        """Return the rates in percent, missing ones as None, and the numbers of pairs."""
        rates = {"false_accept": self.false_accept, "false_reject": self.false_reject}
        return in_percent(rates) | {"positives": self.positives, "negatives": self.negatives}


@dataclass(frozen=True)
class Verification:
    """The exact ROC of all pairs a protocol compares, at the distances of its positive pairs.

    Between two of these distances only false positives are gained, so a curve has its best points
    here, and the true positive rate at a false positive rate is exact.

    Attributes:
        protocol: its name.
        distances: of the pairs of one person, ascending, ``[P]``.
        false_positives: pairs of two people at most as far apart, int64 ``[P]``.
        negatives: pairs of two people.
    """

    protocol: str
    distances: NDArray[np.floating]
    false_positives: NDArray[np.int64]
    negatives: int

    def curve(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return false and true positive rates, both ``[P]``, ascending."""
        count = len(self.distances)
        false: NDArray[np.float64] = np.asarray(self.false_positives, dtype=np.float64)
        false = false / self.negatives if self.negatives else np.full(count, np.nan)
        return false, np.arange(1, count + 1) / max(count, 1)

    def true_positive_rate(self, false_positive_rate: float) -> float:
        """Return the largest true positive rate at a false positive rate at most that given."""
        count = self._accepted(false_positive_rate)
        return float("nan") if count is None else count / len(self.distances)

    def threshold(self, false_positive_rate: float) -> float:
        """Return the distance up to which to accept, for a false positive rate at most that given.

        It is the distance of a positive pair.

        Raises:
            DataError: there is no pair of one person or none of two, or the nearest pair of one
                person lets more false positives in than wanted.
        """
        if not 0.0 <= false_positive_rate <= 1.0:
            raise DataError(f"false positive rate is {false_positive_rate}; it must be in 0..1")
        count = self._accepted(false_positive_rate)
        if count is None:
            raise DataError(
                f"no threshold from protocol {self.protocol}: it compares {len(self.distances)} "
                f"pairs of one person and {self.negatives} of two"
            )
        if not count:
            raise DataError(
                f"no threshold of protocol {self.protocol} has a false positive rate of "
                f"{false_positive_rate:g} or less and accepts any pair of one person; allow more"
            )
        return float(self.distances[count - 1])

    def as_dict(self) -> dict[str, float | int | None]:
        """Return the true positive rates in percent at the usual false positive rates."""
        summary: dict[str, float | int | None] = {}
        for rate in FALSE_POSITIVE_RATES:
            value = self.true_positive_rate(rate)
            # One pair of two people is a larger share than that: no figure can be given.
            missing = np.isnan(value) or rate * self.negatives < 1
            summary[f"TPR@FPR={rate:.0e}"] = None if missing else 100.0 * value
        return summary | {"positives": len(self.distances), "negatives": self.negatives}

    def _accepted(self, false_positive_rate: float) -> int | None:
        """How many positive pairs can be accepted; None if there are none, or no negative ones."""
        if not len(self.distances) or not self.negatives:
            return None
        allowed = np.floor(false_positive_rate * self.negatives * (1 + 1e-12))
        return int(np.searchsorted(self.false_positives, allowed, side="right"))


def verify(comparison: Comparison) -> Verification:
    """Compute the ROC of a protocol, pair by pair, in memory linear in the positive pairs.

    Every query and every gallery image that the protocol compares make a pair, but for the images
    that a ranking leaves out (same person, same camera).
    """
    near: list[Tensor] = []
    for start, block in comparison.blocks():
        same, left_out = comparison.masks(start, start + len(block))
        near.append(block[same & ~left_out])
    if not near:
        return Verification(comparison.protocol.name, np.empty(0), np.empty(0, np.int64), 0)
    edges = torch.cat(near).sort().values
    counts = torch.zeros(len(edges) + 1, dtype=torch.int64, device=edges.device)
    for start, block in comparison.blocks():
        same, _ = comparison.masks(start, start + len(block))
        # The first positive pair that is at least as far apart as each negative one.
        places = torch.bucketize(block[~same], edges)
        counts += torch.bincount(places, minlength=len(counts))
    return Verification(
        protocol=comparison.protocol.name,
        distances=edges.cpu().numpy(),
        false_positives=counts.cumsum(0)[:-1].cpu().numpy(),
        negatives=int(counts.sum()),
    )


def error_rates(comparison: Comparison, threshold: float) -> ErrorRates:
    """Count what a threshold accepts and rejects among all pairs a protocol compares."""
    positives = negatives = accepted = false = 0
    for start, block in comparison.blocks():
        same, left_out = comparison.masks(start, start + len(block))
        near = block <= threshold
        wanted = same & ~left_out
        positives += int(wanted.sum())
        negatives += int((~same).sum())
        accepted += int((near & wanted).sum())
        false += int((near & ~same).sum())
    return ErrorRates(
        threshold=threshold,
        false_accept=false / negatives if negatives else float("nan"),
        false_reject=1.0 - accepted / positives if positives else float("nan"),
        positives=positives,
        negatives=negatives,
    )


@dataclass(frozen=True)
class OpenSetThreshold:
    """A threshold for galleries that need not hold the person asked for.

    Attributes:
        target: the false accept rate it was calibrated for, in 0 .. 1.
        calibration: what it does to the pairs it was calibrated on.
        test: what it does to those of the test, by protocol.
    """

    target: float
    calibration: ErrorRates
    test: dict[str, ErrorRates]

    def as_dict(self) -> dict[str, object]:
        """Return all of it for ``metrics.json``; rates in percent."""
        return {
            "distance": self.calibration.threshold,
            "target_false_accept": 100.0 * self.target,
            "validation": self.calibration.as_dict(),
            "test": {name: rates.as_dict() for name, rates in self.test.items()},
        }


def calibrate_threshold(
    validation: Comparison, tests: list[Comparison], target: float = 1e-3
) -> OpenSetThreshold:
    """Choose a threshold on labelled pairs of known people, and say what it does to others.

    Args:
        validation: people who are in no test, nor were trained on.
        tests: comparisons of the test, with the same search.
        target: false accept rate to keep to, in 0 .. 1.

    Raises:
        DataError: there are too few pairs for such a rate, or no threshold keeps to it, see
            :meth:`Verification.threshold`; or the distances depend on more than the two images.
    """
    if not all(comparison.search.is_plain for comparison in (validation, *tests)):
        raise DataError(
            "a threshold is one of plain distances: those of query expansion and re-ranking depend "
            "on the whole gallery, so what one gallery teaches says nothing about another"
        )
    roc = verify(validation)
    if 0 < target * roc.negatives < 1:
        raise DataError(
            f"a false accept rate of {target:g} cannot be calibrated on {roc.negatives:,} pairs of "
            f"two people: it is less than one of them; ask for {1 / roc.negatives:.1g} or more, or "
            "hold out more identities (data.validation_fraction)"
        )
    threshold = roc.threshold(target)
    return OpenSetThreshold(
        target=target,
        calibration=error_rates(validation, threshold),
        test={test.protocol.name: error_rates(test, threshold) for test in tests},
    )
