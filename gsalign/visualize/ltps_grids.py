"""LTPS grids: where each layer's warp reads the patch map, drawn over the images."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import cast

import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from torch import Tensor

from gsalign.data import VIEW_NAMES, ImageRecord
from gsalign.model import GSAlign
from gsalign.model.ltps import LTPS
from gsalign.visualize.looking import look_at
from gsalign.visualize.style import INK, QUIET, house_style, new_figure, save_figure

_WARPED = "#ffb000"
_PLAIN = "#ffffff"


def ltps_grids(
    network: GSAlign,
    records: Sequence[ImageRecord],
    path: str | os.PathLike[str],
    *,
    title: str = "",
) -> None:
    """Draw images in rows and, for each layer with an LTPS, the grid its warp samples.

    A vertex of the yellow net is where the patch at the same place of the white net is read from;
    dots are the spline's control points, turned by the angle that is written below.

    Args:
        network: whose grids; its device and mode are kept.
        records: the images, one row each.
        path: PNG to write.
        title: above the picture.

    Raises:
        ValueError: the network has no LTPS, or there is no image.
        DataError: an image cannot be read.
    """
    layers = [(name, cast(LTPS, module)) for name, module in network.backbone.ltps.items()]
    if not layers or not records:
        what = "the network has no LTPS" if not layers else "records is empty"
        raise ValueError(f"{what}: there is no grid to draw")
    size, patch = network.config.image_size, network.config.patch_size
    pictures, output = look_at(network, records)
    with torch.no_grad():
        grids = [
            module.sampling_grid(angle).cpu()
            for (_, module), angle in zip(layers, output.angles, strict=True)
        ]
    angles = output.angles.cpu()
    points = [module.source_points.detach().cpu() for _, module in layers]

    # Images in rows under many layers, in columns beside few: nearer to a square.
    in_rows = len(layers) > len(records)
    lines, columns = len(records), len(layers) + 1
    if not in_rows:
        lines, columns = columns, lines
    cell = 1.35
    tall = cell * (size[0] + 1.5 * patch) / (size[1] + 1.5 * patch)
    with house_style():
        figure = new_figure(
            columns * (cell + 0.1) + 0.8, lines * (tall + 0.27) + 0.4 + 0.45 * bool(title)
        )
        panels = figure.subplots(lines, columns, squeeze=False)
        panels = panels if in_rows else panels.T
        for number, record in enumerate(records):
            for axes in panels[number]:
                axes.set_axis_off()
                axes.imshow(pictures[number], interpolation="lanczos", aspect="equal")
                _limit(axes, size, patch)
            for axes, grid, control, angle in zip(
                panels[number, 1:], grids, points, angles[:, number].tolist(), strict=True
            ):
                _net(axes, grid[number], control, angle, size, patch)
            name = f"{VIEW_NAMES[record.view]}\nid {record.identity}"
            _head(panels[number, 0], name, beside=in_rows)
        for axes, (layer, _) in zip(panels[0, 1:], layers, strict=True):
            _head(axes, f"layer {layer}", beside=not in_rows)
        figure.supxlabel(
            "white: the patch map   yellow: where the warp reads it   dots: control points",
            fontsize=8.5,
            color=QUIET,
        )
        if title:
            figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold")
        save_figure(figure, path)


def _head(axes: Axes, text: str, *, beside: bool) -> None:
    """Name a row, beside its first panel, or a column, above it."""
    if beside:
        x, y, horizontal, vertical = -0.05, 0.5, "right", "center"
    else:
        x, y, horizontal, vertical = 0.5, 1.01, "center", "bottom"
    label = axes.text(x, y, text, transform=axes.transAxes, linespacing=1.4)
    label.set(ha=horizontal, va=vertical)


def _limit(axes: Axes, size: tuple[int, int], patch: int) -> None:
    """Leave room for points that are read beyond the border."""
    height, width = size
    margin = 0.75 * patch
    axes.set_xlim(-margin, width + margin)
    axes.set_ylim(height + margin, -margin)


def _to_pixels(points: Tensor, size: tuple[int, int], patch: int) -> Tensor:
    """(x, y) in [-1, 1], where ±1 are the centres of the outermost patches, to pixels."""
    rows, columns = size[0] // patch, size[1] // patch
    cells = torch.tensor([columns - 1, rows - 1], dtype=points.dtype)
    return ((points + 1) / 2 * cells + 0.5) * patch - 0.5


def _net(
    axes: Axes, grid: Tensor, points: Tensor, angle: float, size: tuple[int, int], patch: int
) -> None:
    rows, columns = grid.shape[:2]
    ys, xs = torch.meshgrid(
        torch.linspace(-1, 1, rows), torch.linspace(-1, 1, columns), indexing="ij"
    )
    plain = torch.stack([xs, ys], dim=-1)
    for net, colour, width, opacity in ((plain, _PLAIN, 0.7, 0.65), (grid, _WARPED, 1.1, 1.0)):
        vertices = _to_pixels(net, size, patch)
        lines = [*vertices.numpy(), *vertices.transpose(0, 1).numpy()]
        axes.add_collection(LineCollection(lines, colors=colour, linewidths=width, alpha=opacity))
    turn = torch.tensor(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]],
        dtype=points.dtype,
    )
    control = _to_pixels(points @ turn.T, size, patch)
    axes.scatter(
        control[:, 0], control[:, 1], s=14, color=_WARPED, edgecolor=INK, linewidth=0.6,
        zorder=3,
    )  # fmt: skip
    axes.text(
        0.5, -0.015, f"{math.degrees(angle):+.1f}°", transform=axes.transAxes, ha="center",
        va="top", fontsize=8,
    )  # fmt: skip
