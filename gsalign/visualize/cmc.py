"""CMC curves: the share of queries answered within k images, run beside run, and their mAP."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from gsalign.evaluation import KNOWN_PROTOCOLS, EvaluationResult, protocol_title
from gsalign.visualize.run_lines import legend_of_runs, run_style
from gsalign.visualize.style import house_style, new_figure, save_figure

Results = Mapping[str, EvaluationResult]
RANKS = 20
_COLUMNS = 3


def cmc_curves(
    runs: Mapping[str, Results],
    path: str | os.PathLike[str],
    *,
    ranks: int = RANKS,
    note: str = "",
    title: str = "",
) -> None:
    """Draw a panel per protocol with a CMC curve per run, and the mAP of all as bars.

    Args:
        runs: name of a run to its results by protocol; a protocol that some lack is drawn of the
            others.
        path: PNG to write.
        ranks: how far the curves go, at most as far as the results'.
        note: a line below the picture.
        title: above the picture.

    Raises:
        ValueError: there is no run or no protocol, or ``ranks`` is less than 2.
    """
    names = [name for name in KNOWN_PROTOCOLS if any(name in results for results in runs.values())]
    if not names:
        raise ValueError("runs holds no results, so there is nothing to draw")
    if ranks < 2:
        raise ValueError(f"ranks is {ranks}; wanted at least 2")
    lines = -(-len(names) // _COLUMNS)
    columns = min(_COLUMNS, len(names))
    with house_style():
        figure = new_figure(12, 3.0 * lines + 3.0 + 0.4 * (bool(title) + bool(note)))
        figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.08)
        grid = figure.add_gridspec(lines + 1, columns)
        for place, name in enumerate(names):
            axes = figure.add_subplot(grid[place // columns, place % columns])
            _curves(axes, runs, name, ranks)
            axes.set_ylabel("percent of queries" if place % columns == 0 else "")
        _bars(figure.add_subplot(grid[lines, :]), runs, names)
        if len(runs) > 1:
            legend_of_runs(figure, runs, note)
        if title:
            figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold")
        save_figure(figure, path)


def _curves(axes: Axes, runs: Mapping[str, Results], name: str, ranks: int) -> None:
    drawn = 0
    for place, results in enumerate(runs.values()):
        result = results.get(name)
        if result is None or not result.num_valid_queries:
            continue
        colour, dashes = run_style(place)
        curve = 100 * result.cmc[:ranks]
        axes.plot(
            np.arange(1, len(curve) + 1), curve, color=colour, linestyle=dashes,
            marker="o", markersize=3, markevery=[0],
            label=f"mAP {100 * result.mAP:.1f}, Rank-1 {100 * result.rank1:.1f}",
        )  # fmt: skip
        drawn += 1
    counts = sorted(
        {results[name].num_valid_queries for results in runs.values() if name in results}
    )
    queries = " or ".join(f"{count:,}" for count in counts)
    axes.set_title(f"{protocol_title(name)}, {queries} queries")
    axes.set_xlim(1, ranks)
    axes.set_ylim(0, 102)
    axes.set_xlabel("rank")
    axes.set_xticks([1, *range(5, ranks + 1, 5)])
    if drawn:
        axes.legend(
            loc="lower right", frameon=False, fontsize=8 if drawn <= 4 else 7, handlelength=2.6
        )


def _bars(axes: Axes, runs: Mapping[str, Results], names: Sequence[str]) -> None:
    axes.set_title("mAP")
    axes.set_ylabel("percent")
    width = 0.8 / max(len(runs), 2)
    for place, results in enumerate(runs.values()):
        offset = (place - (len(runs) - 1) / 2) * width
        values = [100 * results[name].mAP if name in results else float("nan") for name in names]
        bars = axes.bar(
            np.arange(len(names)) + offset, values, 0.92 * width, color=run_style(place)[0],
        )  # fmt: skip
        # On end where they would touch.
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=8, rotation=90 if len(runs) > 4 else 0)
    axes.set_xticks(range(len(names)), [protocol_title(name) for name in names])
    axes.grid(axis="x", visible=False)
    axes.margins(x=0.02, y=0.1)
