"""LTPS grids: where each layer's warp reads the patch map, and the images read like that."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import cast

import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from torch import Tensor

from gsalign.data import ImageRecord
from gsalign.model import GSAlign
from gsalign.model.ltps import LTPS, rotated
from gsalign.visualize.looking import aligned_note, image_label, look_at
from gsalign.visualize.style import INK, QUIET, house_style, new_figure, save_figure
from gsalign.visualize.warped import warped_images

_WARPED = "#ffb000"
_PLAIN = "#ffffff"
_MARGIN = 0.4
"""Room around an image, for what is read beyond its border, in patches."""


def ltps_grids(
    network: GSAlign,
    records: Sequence[ImageRecord],
    path: str | os.PathLike[str],
    *,
    title: str = "",
) -> None:
    """Draw images and, for each layer with an LTPS, the grid its warp samples and what it reads.

    A vertex of the yellow net is where the patch at the same place of the white net is read from;
    dots are the spline's control points, turned by the angle that is written below. The panel next
    to it, or below it, is the image read through that net, see
    :func:`gsalign.visualize.warped.warped_images`.

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
    pixels = pictures.permute(0, 3, 1, 2).float()
    with torch.no_grad():
        grids, warped, points = [], [], []
        own = [None] * len(layers) if output.offsets is None else output.offsets
        for (_, module), angle, offsets in zip(layers, output.angles, own, strict=True):
            grids.append(module.sampling_grid(angle, offsets).cpu())
            read = warped_images(module, angle, pixels, offsets)
            read = read.round_().clamp_(0, 255).to(torch.uint8)
            warped.append(read.permute(0, 2, 3, 1))
            control = module.points(offsets)
            points.append(rotated(control, angle.to(control), module.aspect).cpu())
    angles = output.angles.cpu()

    # Images in rows under many layers, in columns beside few: nearer to a square. What is read
    # stands below its net in the first case, beside it in the second.
    in_rows = len(layers) > len(records)
    lines, columns = len(records), len(layers) + 1
    deep, wide = (2 * lines, columns) if in_rows else (columns, 2 * lines)
    cell = 1.05
    tall = cell * (size[0] + 2 * _MARGIN * patch) / (size[1] + 2 * _MARGIN * patch)
    with house_style():
        figure = new_figure(
            wide * (cell + 0.13) + 0.8, deep * (tall + 0.17) + 0.5 + 0.45 * bool(title)
        )
        panels = figure.subplots(deep, wide, squeeze=False)
        # [image, what is read, layer], whichever way they lie.
        panels = (panels if in_rows else panels.T).reshape(lines, 2, columns)
        for number, record in enumerate(records):
            for axes in panels[number].flat:
                axes.set_axis_off()
            for axes in panels[number, 0]:
                axes.imshow(pictures[number].numpy(), interpolation="lanczos")
            for place, (grid, read, control) in enumerate(
                zip(grids, warped, points, strict=True), 1
            ):
                net, beside = panels[number, :, place]
                _net(net, grid[number], control[number], angles[place - 1, number], size, patch)
                beside.imshow(read[number].numpy(), interpolation="lanczos")
            for axes in panels[number].flat:
                _limit(axes, size, patch)
            _head(panels[number, 0, 0], image_label(record), beside=in_rows)
        for axes, (layer, _) in zip(panels[0, 0, 1:], layers, strict=True):
            _head(axes, f"layer {layer}", beside=not in_rows)
        notes = (
            "white: the patch map   yellow: where the warp reads it   dots: control points   "
            f"{'below' if in_rows else 'beside'}: the image read like that",
            aligned_note(network),
        )
        figure.supxlabel("\n".join(filter(None, notes)), fontsize=8.5, color=QUIET)
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
    label.set(ha=horizontal, va=vertical, fontsize=8.5 if beside else 8)


def _limit(axes: Axes, size: tuple[int, int], patch: int) -> None:
    """Leave room for points that are read beyond the border."""
    height, width = size
    margin = _MARGIN * patch
    axes.set_xlim(-margin, width + margin)
    axes.set_ylim(height + margin, -margin)


def _to_pixels(points: Tensor, size: tuple[int, int], patch: int) -> Tensor:
    """(x, y) in [-1, 1], where ±1 are the centres of the outermost patches, to pixels."""
    rows, columns = size[0] // patch, size[1] // patch
    cells = torch.tensor([columns - 1, rows - 1], dtype=points.dtype)
    return ((points + 1) / 2 * cells + 0.5) * patch - 0.5


def _net(
    axes: Axes, grid: Tensor, points: Tensor, angle: Tensor, size: tuple[int, int], patch: int
) -> None:
    rows, columns = grid.shape[:2]
    ys, xs = torch.meshgrid(
        torch.linspace(-1, 1, rows), torch.linspace(-1, 1, columns), indexing="ij"
    )
    plain = torch.stack([xs, ys], dim=-1)
    # Many patches would else cover the image.
    thin = min(1.0, 8 / rows)
    for net, colour, width, opacity in (
        (plain, _PLAIN, 0.7 * thin, 0.65),
        (grid, _WARPED, 1.1 * thin, 1.0),
    ):
        vertices = _to_pixels(net, size, patch)
        lines = [*vertices.numpy(), *vertices.transpose(0, 1).numpy()]
        axes.add_collection(LineCollection(lines, colors=colour, linewidths=width, alpha=opacity))
    control = _to_pixels(points, size, patch)
    axes.scatter(
        control[:, 0], control[:, 1], s=14, color=_WARPED, edgecolor=INK, linewidth=0.6,
        zorder=3,
    )  # fmt: skip
    axes.text(
        0.5, -0.015, f"{_in_degrees(float(angle))}°", transform=axes.transAxes, ha="center",
        va="top", fontsize=8,
    )  # fmt: skip


def _in_degrees(angle: float) -> str:
    """With a sign, unless it rounds to nothing."""
    told = f"{math.degrees(angle):+.1f}"
    return "0.0" if float(told) == 0 else told
