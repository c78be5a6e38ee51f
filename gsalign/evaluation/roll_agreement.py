"""Does the alignment align? Predicted angles against the true roll of the camera."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rich.table import Table

from gsalign.evaluation.figures import figure_text, rounded
from gsalign.tables import plain_table

COMPOSED = "all together"


def circular_correlation(left: ArrayLike, right: ArrayLike) -> float:
    """Fisher and Lee's correlation of two samples of angles.

    The sum over pairs i < j of ``sin(a_i - a_j) sin(b_i - b_j)`` over the root of the product of
    the sums of squares: 1 where b is a plus a constant, -1 where it is a constant minus a, near 0
    for independent angles. Needs no means, which angles all around the circle have not.

    Args:
        left: ``[N]``, radians.
        right: ``[N]``, radians.

    Returns:
        In [-1, 1]; NaN for fewer than two angles, or where one side never changes.

    Raises:
        ValueError: the two are not of the same length.

    Source: N. I. Fisher and A. J. Lee, A correlation coefficient for circular data, Biometrika 70
    (1983), 327-332.
    """
    a, b = np.asarray(left, np.float64), np.asarray(right, np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"angles must be two of [N], got {list(a.shape)} and {list(b.shape)}")
    # Sums over pairs of products of sines are squares of sums: O(N) instead of O(N^2).
    together = abs(np.exp(1j * (a - b)).sum()) ** 2 - abs(np.exp(1j * (a + b)).sum()) ** 2
    spread = [a.size**2 - abs(np.exp(2j * angles).sum()) ** 2 for angles in (a, b)]
    if min(spread) <= 1e-12 * a.size**2:
        return math.nan
    return float(np.clip(together / math.sqrt(spread[0] * spread[1]), -1.0, 1.0))


@dataclass(frozen=True)
class RollMatch:
    """One angle of the network against the true roll, over the images of one view.

    Attributes:
        angle: whose: ``image``, ``layer 0``, ... or the sum of all.
        view: ``aerial`` or ``ground``.
        images: how many.
        correlation: see :func:`circular_correlation`.
        error: median of the absolute difference, degrees, 0..180; 90 is chance.
        upright: share of the images that differ by less than 90 degrees.
    """

    angle: str
    view: str
    images: int
    correlation: float
    error: float
    upright: float


@dataclass(frozen=True)
class RollAgreement:
    """How the angles of a network agree with the true roll, for each angle and view."""

    matches: tuple[RollMatch, ...]

    def as_dict(self) -> dict[str, object]:
        """For JSON: figures that do not exist are None."""
        tree: dict[str, dict[str, object]] = {}
        for match in self.matches:
            tree.setdefault(match.angle, {})[match.view] = {
                "images": match.images,
                "correlation": rounded(match.correlation),
                "median_error_degrees": rounded(match.error),
                "upright": rounded(match.upright),
            }
        return dict(tree)

    def as_table(self) -> Table:
        """As a rich table, a row per angle and view."""
        table = plain_table(
            "angles against the true roll",
            ("Angle", "view"),
            ("images", "circular r", "median error", "within 90°"),
        )
        for match in self.matches:
            table.add_row(
                match.angle,
                match.view,
                str(match.images),
                figure_text(match.correlation),
                f"{match.error:.1f}°",
                f"{match.upright:.1%}",
            )
        return table


def roll_agreement(
    angles: Mapping[str, NDArray[np.floating]],
    roll: NDArray[np.floating],
    views: Mapping[str, NDArray[np.bool_]],
) -> RollAgreement:
    """Compare every angle, and their sum, with the truth.

    Args:
        angles: ``[N]`` radians by name; with more than one also their sum is compared.
        roll: ``[N]``, the true roll, radians.
        views: which images ``[N]`` each view has, by name; one without images is left out.
    """
    rows = dict(angles)
    if len(rows) > 1:
        rows[COMPOSED] = np.sum(list(angles.values()), axis=0)
    matches = []
    for name, angle in rows.items():
        for view, chosen in views.items():
            if not chosen.any():
                continue
            difference = np.abs(np.angle(np.exp(1j * (angle[chosen] - roll[chosen]))))
            matches.append(
                RollMatch(
                    angle=name,
                    view=view,
                    images=int(chosen.sum()),
                    correlation=circular_correlation(angle[chosen], roll[chosen]),
                    error=math.degrees(float(np.median(difference))),
                    upright=float((difference < math.pi / 2).mean()),
                )
            )
    return RollAgreement(tuple(matches))
