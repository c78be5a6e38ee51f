"""Rank lists: what the gallery answers to a few queries, right and wrong told by the frame."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray

from gsalign.data import VIEW_NAMES, ImageRecord, read_image, resize
from gsalign.visualize.looking import image_label
from gsalign.visualize.style import (
    INK,
    QUIET,
    RIGHT,
    RIGHT_SAME_VIEW,
    WRONG,
    house_style,
    new_figure,
    save_figure,
)

_TICK, _CROSS = "✓", "✕"


@dataclass(frozen=True)
class RankList:
    """A query and its first answers.

    Attributes:
        query: the image that asks.
        answers: gallery images, the nearest first, those of the same identity and camera left out.
        average_precision: of the whole list, 0 to 1; NaN when it has no positive.
    """

    query: ImageRecord
    answers: tuple[ImageRecord, ...]
    average_precision: float


def choose_queries(
    views: NDArray[np.int64], average_precision: NDArray[np.float64], per_view: int = 3
) -> list[int]:
    """Queries that show the range: of each view, spread evenly from the best AP to the worst.

    Args:
        views: of the queries, ``[Q]``.
        average_precision: of the queries, ``[Q]``; NaN where a query has no positive.
        per_view: how many of each view.

    Returns:
        Places of the chosen queries, aerial ones first, each view from best to worst.
    """
    chosen: list[int] = []
    for view in (1, 0):
        places = np.flatnonzero((views == view) & ~np.isnan(average_precision))
        order = places[np.argsort(-average_precision[places], kind="stable")]
        count = min(per_view, len(order))
        spread = np.linspace(0, len(order) - 1, count).round().astype(int)
        chosen += order[spread].tolist()
    return chosen


def rank_lists(
    lists: Sequence[RankList],
    path: str | os.PathLike[str],
    *,
    image_size: tuple[int, int] = (128, 64),
    title: str = "",
) -> None:
    """Draw queries and their answers, one query per row.

    A green frame with a tick is the right person in the other view, a blue one with a tick the
    right person in the view of the query, a red one with a cross another person.

    Args:
        lists: the rows; all with the same number of answers, or fewer.
        path: PNG to write.
        image_size: (height, width) that images are shown at, in pixels.
        title: above the picture.

    Raises:
        ValueError: there is no row.
        DataError: an image cannot be read.
    """
    if not lists:
        raise ValueError("lists is empty: there is no query to draw")
    columns = max(len(row.answers) for row in lists)
    height, width = image_size
    cell = 0.86
    tall = cell * height / width
    with house_style():
        figure = new_figure(
            cell * (columns + 1.35) + 1.2, len(lists) * (tall + 0.24) + 0.5 + 0.4 * bool(title)
        )
        ratios = [1.0, 0.22, *([1.0] * columns)]
        grid = figure.subplots(
            len(lists), columns + 2, squeeze=False, gridspec_kw={"width_ratios": ratios}
        )
        for axes in grid.flat:
            axes.set_axis_off()
        for line, row in enumerate(lists):
            _draw_query(grid[line, 0], row, image_size)
            for number, answer in enumerate(row.answers):
                _draw_answer(grid[line, number + 2], row.query, answer, number + 1, image_size)
        for column in range(columns):
            grid[0, column + 2].set_title(
                f"{column + 1}", loc="center", fontsize=9, color=QUIET, fontweight="normal", pad=4
            )
        grid[0, 0].set_title("query", loc="center", fontsize=9, fontweight="bold", pad=4)
        figure.legend(
            handles=[
                Patch(color=RIGHT, label=f"{_TICK} right person, other view"),
                Patch(color=RIGHT_SAME_VIEW, label=f"{_TICK} right person, same view"),
                Patch(color=WRONG, label=f"{_CROSS} another person"),
            ],
            loc="outside lower center",
            ncols=3,
            frameon=False,
            fontsize=9,
        )
        if title:
            figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold")
        save_figure(figure, path)


def _show(axes: Axes, record: ImageRecord, image_size: tuple[int, int]) -> None:
    pixels = resize(read_image(record.path), image_size).permute(1, 2, 0).numpy()
    axes.imshow(pixels, interpolation="lanczos", aspect="equal")


def _frame(axes: Axes, colour: str, image_size: tuple[int, int], thickness: float) -> None:
    height, width = image_size
    axes.add_patch(
        Rectangle(
            (-0.5, -0.5),
            width,
            height,
            fill=False,
            edgecolor=colour,
            linewidth=thickness,
            clip_on=False,
            joinstyle="miter",
        )
    )


def _draw_query(axes: Axes, row: RankList, image_size: tuple[int, int]) -> None:
    _show(axes, row.query, image_size)
    _frame(axes, INK, image_size, 1.6)
    told = f"{image_label(row.query)}\nAP {row.average_precision:.2f}"
    axes.text(
        -0.1, 0.5, told, transform=axes.transAxes, ha="right", va="center", fontsize=8.5,
        linespacing=1.5,
    )  # fmt: skip


def _draw_answer(
    axes: Axes, query: ImageRecord, answer: ImageRecord, rank: int, image_size: tuple[int, int]
) -> None:
    _show(axes, answer, image_size)
    right = answer.identity == query.identity
    colour = WRONG
    if right:
        colour = RIGHT_SAME_VIEW if answer.view == query.view else RIGHT
    _frame(axes, colour, image_size, 3.0)
    # A mark besides the colour: red and green are one to one man in twelve.
    axes.text(
        0.94, 0.97, _TICK if right else _CROSS, transform=axes.transAxes, ha="right", va="top",
        color="white", fontsize=7.5, fontweight="bold",
        bbox={"boxstyle": "square,pad=0.2", "facecolor": colour, "edgecolor": "none"},
    )  # fmt: skip
    axes.text(
        0.5, -0.03, f"{VIEW_NAMES[answer.view]} {answer.camera_name}", transform=axes.transAxes,
        ha="center", va="top", fontsize=7, color=QUIET,
    )  # fmt: skip
