"""Training curves of several runs in one picture: the whole loss, and retrieval on the test."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from gsalign.evaluation import protocol_title
from gsalign.visualize.curves import Record
from gsalign.visualize.panels import or_nan, say
from gsalign.visualize.run_lines import legend_of_runs, run_style
from gsalign.visualize.style import house_style, new_figure, save_figure

Points = list[tuple[int, float]]

PROTOCOL = "all"


def compared_curves(
    runs: Mapping[str, Iterable[Record]],
    path: str | os.PathLike[str],
    *,
    note: str = "",
    title: str = "",
) -> None:
    """Draw the ``metrics.json`` of several runs, a line each.

    Args:
        runs: name of a run to its records, see ``gsalign.engine.metrics``.
        path: PNG to write.
        note: a line below the picture.
        title: above the picture.

    Raises:
        ValueError: there is no ``train`` record in any of them.
    """
    kept = {name: list(records) for name, records in runs.items()}
    losses = {name: _losses(records) for name, records in kept.items()}
    if not any(losses.values()):
        raise ValueError("the runs hold no train record, so there is nothing to draw")
    with house_style():
        figure = new_figure(12, 4.3 + 0.4 * bool(title) + 0.2 * bool(note))
        figure.set_layout_engine("constrained", h_pad=0.12, w_pad=0.1)
        left, *others = figure.subplots(1, 3)
        left.set_title("Total loss, weights applied")
        left.set_yscale("log")
        # Losses of a run may stay within a decade.
        left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        left.yaxis.set_minor_locator(NullLocator())
        left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        _lines(left, losses)
        for axes, measure in zip(others, ("mAP", "Rank-1"), strict=True):
            axes.set_title(f"{measure} on the test, {protocol_title(PROTOCOL)}")
            found = {name: _evaluations(records, measure) for name, records in kept.items()}
            if any(found.values()):
                axes.set_ylabel("percent")
                _lines(axes, found, marker="o")
                axes.set_ylim(0, None)
            else:
                say(axes, "not evaluated yet")
        legend_of_runs(figure, runs, note)
        if title:
            figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold")
        save_figure(figure, path)


def _losses(records: Iterable[Record]) -> Points:
    return [(r["iteration"], r["total_loss"]) for r in records if r["kind"] == "train"]


def _evaluations(records: Iterable[Record], measure: str) -> Points:
    """A figure of the test over the iterations, where there is one."""
    found = [
        (record["iteration"], or_nan(record["protocols"].get(PROTOCOL, {}).get(measure)))
        for record in records
        if record["kind"] == "evaluation" and record["split"] == "test"
    ]
    return [(iteration, value) for iteration, value in found if not math.isnan(value)]


def _lines(axes: Axes, runs: Mapping[str, Points], marker: str = "") -> None:
    for place, points in enumerate(runs.values()):
        colour, dashes = run_style(place)
        axes.plot(
            [x for x, _ in points], [y for _, y in points], color=colour, linestyle=dashes,
            marker=marker, markersize=3.5,
        )  # fmt: skip
    axes.margins(x=0.03)
    axes.set_xlabel("iteration")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
