"""How runs that stand beside one another are told apart: colour and dashes, and their names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gsalign.visualize.style import SERIES

# Colour is not all that tells lines apart.
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))


def run_style(place: int) -> tuple[str, Any]:
    """Colour and dashes of the lines of a run, counted from 0; no two of the first 32 are alike."""
    # One further with every round of the colours, of which there are a multiple of the dashes.
    dashes = place + place // len(SERIES)
    return SERIES[place % len(SERIES)], _DASHES[dashes % len(_DASHES)]


def legend_of_runs(figure: Figure, runs: Iterable[str], note: str) -> None:
    """Name the lines of runs below a figure, and above the names what there is to note."""
    styles = ((run, *run_style(place)) for place, run in enumerate(runs))
    figure.legend(
        handles=[Line2D([], [], color=c, linestyle=dashes, label=run) for run, c, dashes in styles],
        title=note,
        title_fontproperties={"size": 8.5, "weight": "normal"},  # type: ignore[arg-type]
        loc="outside lower center",
        ncols=4,
        frameon=False,
        handlelength=3,
    )
