"""What panels of several pictures have in common: names at line ends, a word where nothing is."""

from __future__ import annotations

import math

from matplotlib.axes import Axes

from gsalign.visualize.style import QUIET


def label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Name lines at their right end, moved apart where they would touch.

    Args:
        axes: the panel, its limits set.
        ends: last value, name and colour of each line.
    """
    low, high = axes.get_ylim()
    logarithmic = axes.get_yscale() == "log"

    def height(value: float) -> float:
        if logarithmic:
            value = max(value, low)
            return math.log(value / low) / math.log(high / low)
        return (value - low) / (high - low)

    places: list[float] = []
    for value, name, colour in sorted(ends, key=lambda end: end[0]):
        place = max(height(value), places[-1] + 0.058 if places else -1.0)
        places.append(place)
        axes.annotate(
            name,
            (1.0, place),
            xytext=(6, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            color=colour,
            va="center",
            fontsize=8.5,
        )


def say(axes: Axes, text: str) -> None:
    """Write in the middle of a panel that has nothing to show."""
    axes.set_axis_off()
    # Of the panel, not of its data: without any, their range may be anywhere.
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=QUIET)


def or_nan(value: float | None) -> float:
    """A figure that may not be there, as NaN then."""
    return math.nan if value is None else float(value)
