"""Training curves: losses, retrieval, LTPS angles and learning rate over the iterations."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from gsalign.evaluation.protocols import KNOWN_PROTOCOLS, protocol_title
from gsalign.visualize.panels import label_ends, or_nan, say
from gsalign.visualize.style import INK, QUIET, SERIES, house_style, new_figure, save_figure

Record = dict[str, Any]


def training_curves(
    records: Iterable[Record], path: str | os.PathLike[str], *, title: str = ""
) -> None:
    """Draw the ``metrics.json`` of a run.

    Args:
        records: its lines, see ``gsalign.engine.metrics``.
        path: PNG to write.
        title: above the picture.

    Raises:
        ValueError: there is no ``train`` record.
    """
    records = list(records)
    train = [record for record in records if record["kind"] == "train"]
    tests = [r for r in records if r["kind"] == "evaluation" and r["split"] == "test"]
    if not train:
        raise ValueError("the records hold no train record, so there is nothing to draw")
    with house_style():
        figure = new_figure(12, 7.6)
        figure.set_layout_engine("constrained", h_pad=0.12, w_pad=0.1)
        grid = figure.subplots(2, 2)
        _losses(grid[0, 0], train)
        _retrieval(grid[0, 1], tests)
        _angles(grid[1, 0], train)
        _rate(grid[1, 1], train)
        for axes in grid.flat:
            axes.margins(x=0.01)
            if axes.has_data() and axes is not grid[0, 1]:
                axes.set_xlabel("iteration")
            if axes is not grid[0, 1]:
                axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if len(tests) > 1:
            grid[0, 1].set_xlabel("iteration")
        if title:
            figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold")
        save_figure(figure, path)


def _losses(axes: Axes, train: Sequence[Record]) -> None:
    axes.set_title("Losses, weights applied")
    steps = [record["iteration"] for record in train]
    names = list(train[0]["losses"])
    ends = []
    total = [record["total_loss"] for record in train]
    axes.plot(steps, total, color=INK, linewidth=2.2, label="total")
    ends.append((total[-1], "total", INK))
    for name, colour in zip(names, SERIES, strict=False):
        values = [record["losses"][name] for record in train]
        if not any(value > 0 for value in values):
            continue
        axes.plot(steps, values, color=colour)
        ends.append((values[-1], name, colour))
    axes.set_yscale("log")
    # Terms that have all but vanished would squeeze the others into one line.
    axes.set_ylim(bottom=max(axes.get_ylim()[0], 1e-4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    label_ends(axes, ends)


def _retrieval(axes: Axes, tests: Sequence[Record]) -> None:
    axes.set_title("Retrieval on the test set: mAP (full lines), Rank-1 (dashed)")
    axes.set_ylabel("percent")
    if not tests:
        say(axes, "not evaluated yet")
        return
    names = [name for name in KNOWN_PROTOCOLS if name in tests[-1]["protocols"]]
    if len(tests) == 1:
        _bars(axes, tests[0]["protocols"], names)
        return
    steps = [record["iteration"] for record in tests]
    ends = []
    for name, colour in zip(names, SERIES, strict=False):
        figures = [record["protocols"][name] for record in tests]
        values = [or_nan(figure["mAP"]) for figure in figures]
        first = [or_nan(figure["Rank-1"]) for figure in figures]
        axes.plot(steps, first, color=colour, linewidth=1.0, linestyle=(0, (2, 2)), alpha=0.75)
        axes.plot(steps, values, color=colour, marker="o", markersize=3.5)
        if not math.isnan(values[-1]):
            ends.append((values[-1], protocol_title(name), colour))
    axes.set_ylim(0, None)
    if len(steps) <= 8:
        axes.set_xticks(steps)
    label_ends(axes, ends)


def _bars(axes: Axes, protocols: dict[str, Record], names: Sequence[str]) -> None:
    places = np.arange(len(names))
    axes.set_title("Retrieval at the end of the run")
    for offset, figure, colour in ((-0.2, "Rank-1", SERIES[5]), (0.2, "mAP", SERIES[0])):
        values = [or_nan(protocols[name][figure]) for name in names]
        bars = axes.bar(places + offset, values, 0.36, color=colour, label=figure)
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=8, color=INK)
    counts = [
        f"{protocol_title(name)}\n{protocols[name]['valid_queries']} queries" for name in names
    ]
    axes.set_xticks(places, counts, fontsize=8)
    axes.grid(axis="x", visible=False)
    axes.legend(frameon=False, ncols=2, loc="upper right", borderaxespad=0)
    axes.margins(y=0.18)


def _angles(axes: Axes, train: Sequence[Record]) -> None:
    axes.set_title("Angle by layer, mean and spread over a batch")
    axes.set_ylabel("degrees")
    layers = list(train[-1]["angles"])
    if not layers:
        say(axes, "this network has no LTPS")
        return
    steps = [record["iteration"] for record in train]
    colours = [_between(number / max(len(layers) - 1, 1)) for number in range(len(layers))]
    ends = []
    for layer, colour in zip(layers, colours, strict=True):
        mean = np.degrees([record["angles"][layer]["mean"] for record in train])
        std = np.degrees([record["angles"][layer]["std"] for record in train])
        axes.fill_between(steps, mean - std, mean + std, color=colour, alpha=0.18, linewidth=0)
        axes.plot(steps, mean, color=colour)
        ends.append((float(mean[-1]), layer if layer == "image" else f"layer {layer}", colour))
    low, high = axes.get_ylim()
    # A degree or so of room, or numerical dust would look like movement.
    reach = max(abs(low), abs(high), 1.5)
    axes.set_ylim(-reach, reach)
    axes.axhline(0, color=QUIET, linewidth=0.8)
    label_ends(axes, ends)


def _between(share: float) -> str:
    """From early layers (light blue) to late ones (dark blue)."""
    early, late = np.array([0x8C, 0xC4, 0xE0]), np.array([0x12, 0x2B, 0x4A])
    red, green, blue = (early + share * (late - early)).astype(int).tolist()
    return f"#{red:02x}{green:02x}{blue:02x}"


def _rate(axes: Axes, train: Sequence[Record]) -> None:
    axes.set_title("Learning rate and seconds per iteration")
    steps = [record["iteration"] for record in train]
    axes.plot(steps, [record["lr"] for record in train], color=SERIES[0])
    axes.set_ylabel("learning rate", color=SERIES[0])
    axes.set_ylim(0, None)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    speed = axes.twinx()
    speed.grid(False)
    speed.spines["right"].set_visible(False)
    speed.plot(steps, [record["time"] for record in train], color=SERIES[3], linewidth=1.2)
    speed.plot(
        steps,
        [record["data_time"] for record in train],
        color=SERIES[3],
        linewidth=1.2,
        linestyle=(0, (2, 1.5)),
    )
    speed.set_ylabel("seconds (dashed: waiting for data)", color="#a8701a")
    speed.set_ylim(0, None)
