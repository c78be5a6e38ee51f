"""Pictures of a study: every run by protocol, and learning curves with their spread."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from gsalign.evaluation.protocols import protocol_title
from gsalign.visualize.run_lines import run_style
from gsalign.visualize.style import QUIET, SERIES, house_style, new_figure, save_figure

if TYPE_CHECKING:
    from gsalign.study import StudyRow

_COLUMNS = 3


def study_points(
    rows: Sequence[StudyRow],
    path: str | os.PathLike[str],
    *,
    metric: str = "mAP",
    baseline: str = "",
    protocols: Sequence[str] = (),
    title: str = "",
) -> None:
    """Draw the ends of all runs: a panel per protocol, a line per variant, a point per seed.

    A stroke marks the mean of a variant, a bar one standard deviation either way, and a dashed line
    the mean of the baseline.

    Args:
        rows: of the study's table.
        path: PNG to write.
        metric: the figure to draw.
        baseline: name of the variant that the others are compared with; empty: none.
        protocols: these only; all if empty.
        title: above the picture.

    Raises:
        ValueError: there is nothing to draw.
    """
    final = [row for row in rows if row.is_final]
    variants = list(dict.fromkeys(row.variant for row in final))
    shown = _shown(final, protocols)
    with house_style():
        height = 0.9 + 0.3 * len(variants)
        figure, panels = _panels(len(shown), height)
        for number, (panel, protocol) in enumerate(zip(panels, shown, strict=True)):
            panel.set_title(protocol_title(protocol))
            for place, variant in enumerate(variants):
                values = _values(final, variant, protocol, metric)
                _points(panel, place, values, SERIES[place % len(SERIES)])
                if variant == baseline and values.size:
                    panel.axvline(
                        values.mean(), color=QUIET, linewidth=0.9, linestyle=(0, (3, 3)), zorder=0
                    )
            panel.set_ylim(len(variants) - 0.5, -0.5)
            panel.set_yticks(range(len(variants)), variants)
            # The variants have the same places everywhere; the first column names them.
            panel.tick_params(axis="y", length=0, labelleft=number % _COLUMNS == 0)
            panel.spines["left"].set_visible(False)
            panel.grid(axis="y", visible=False)
            panel.xaxis.set_major_locator(MaxNLocator(6))
            panel.margins(x=0.08)
        _name_bottom(panels, f"{metric}, percent")
        _head(figure, title)
        save_figure(figure, path)


def study_curves(
    rows: Sequence[StudyRow],
    path: str | os.PathLike[str],
    *,
    metric: str = "mAP",
    protocols: Sequence[str] = (),
    title: str = "",
) -> None:
    """Draw a figure over the iterations: a panel per protocol, a line per variant.

    Lines are means over the seeds, bands one standard deviation either way.

    Args:
        rows: of the study's table.
        path: PNG to write.
        metric: the figure to draw.
        protocols: these only; all if empty.
        title: above the picture.

    Raises:
        ValueError: there is nothing to draw.
    """
    variants = list(dict.fromkeys(row.variant for row in rows))
    shown = _shown(rows, protocols)
    with house_style():
        figure, panels = _panels(len(shown), 2.6)
        for panel, protocol in zip(panels, shown, strict=True):
            panel.set_title(protocol_title(protocol))
            panel.set_ylabel(f"{metric}, percent")
            for place, variant in enumerate(variants):
                mine = [row for row in rows if row.variant == variant]
                _curve(panel, mine, protocol, metric, variant, place)
            panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            panel.set_ylim(0, None)
        _name_bottom(panels, "iteration")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=min(6, len(labels)),
            frameon=False,
            handlelength=3,
        )
        _head(figure, title)
        save_figure(figure, path)


def _shown(rows: Sequence[StudyRow], protocols: Sequence[str]) -> list[str]:
    there = list(dict.fromkeys(row.protocol for row in rows))
    shown = [name for name in protocols or there if name in there]
    if not shown:
        raise ValueError("the table holds no finished run of these protocols: nothing to draw")
    return shown


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels of this height in inches, in rows of three."""
    columns = min(_COLUMNS, count)
    lines = -(-count // columns)
    figure = new_figure(1.0 + 3.7 * columns, 0.7 + height * lines)
    figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.08)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for unused in panels[count:]:
        unused.set_axis_off()
    return figure, panels[:count]


def _name_bottom(panels: Sequence[Axes], name: str) -> None:
    """Name the x axis of the lowest panel of every column."""
    for panel in panels[-_COLUMNS:]:
        panel.set_xlabel(name)


def _head(figure: Figure, title: str) -> None:
    if title:
        figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold")


def _values(
    rows: Sequence[StudyRow], variant: str, protocol: str, metric: str, step: int | None = None
) -> NDArray[np.float64]:
    """What the seeds of a variant gave, at the end or at a step, without NaN."""
    values = [
        row.figures[metric]
        for row in rows
        if (row.variant, row.protocol) == (variant, protocol) and step in (None, row.step)
    ]
    return np.asarray([value for value in values if not math.isnan(value)], dtype=np.float64)


def _points(panel: Axes, place: int, values: NDArray[np.float64], colour: str) -> None:
    if not values.size:
        return
    mean = float(values.mean())
    if values.size > 1:
        half = float(values.std(ddof=1))
        panel.plot([mean - half, mean + half], [place, place], color=colour, linewidth=5, alpha=0.3)
    panel.plot([mean, mean], [place - 0.26, place + 0.26], color=colour, linewidth=2.2)
    panel.scatter(
        values,
        np.full(values.size, place),
        s=22,
        color=colour,
        edgecolor="white",
        linewidth=0.7,
        zorder=3,
    )


def _curve(
    panel: Axes, rows: Sequence[StudyRow], protocol: str, metric: str, variant: str, place: int
) -> None:
    colour, dashes = run_style(place)
    steps = sorted({row.step for row in rows if row.protocol == protocol})
    found = [_values(rows, variant, protocol, metric, step) for step in steps]
    steps = [step for step, values in zip(steps, found, strict=True) if values.size]
    found = [values for values in found if values.size]
    mean = np.array([values.mean() for values in found])
    half = np.array([values.std(ddof=1) if values.size > 1 else 0.0 for values in found])
    panel.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
    panel.plot(steps, mean, color=colour, linestyle=dashes, marker="o", markersize=3, label=variant)
