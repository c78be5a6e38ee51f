"""Alignment: images as they come, what of them is found to be the person, and as they are seen."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from gsalign.data import ImageRecord, read_image, resize
from gsalign.model import GSAlign
from gsalign.visualize.looking import image_label, look_at
from gsalign.visualize.style import QUIET, house_style, new_figure, save_figure

_CELL = 1.15
"""Width of an image, inches."""


def alignment(
    network: GSAlign,
    records: Sequence[ImageRecord],
    path: str | os.PathLike[str],
    *,
    title: str = "",
) -> None:
    """Draw images before and after the network's alignment, and its share of the person between.

    Above each image stands the roll that was undone, in degrees, clockwise.

    Args:
        network: whose alignment; its device and mode are kept.
        records: the images, one column each.
        path: PNG to write.
        title: above the picture.

    Raises:
        ValueError: the network aligns no images, or there is no image.
        DataError: an image cannot be read.
    """
    if network.uprighting is None or not records:
        what = "the network aligns no images" if network.uprighting is None else "records is empty"
        raise ValueError(f"{what}: there is no alignment to draw")
    size = network.config.image_size
    aligned, output = look_at(network, records)
    images = torch.stack([resize(read_image(record.path), size) for record in records])
    rows = {"image": images.permute(0, 2, 3, 1).numpy()}
    if output.person is not None:
        rows["share of\nthe person"] = output.person[:, 0].float().cpu().numpy()
    rows["as the\nnetwork\nsees it"] = aligned.numpy()
    labels = [image_label(record) for record in records]
    if output.direction is not None:
        angles = torch.atan2(output.direction[:, 1], output.direction[:, 0]).tolist()
        labels = [
            f"{label}\n{round(math.degrees(angle)):+d}°"
            for label, angle in zip(labels, angles, strict=True)
        ]

    tall = _CELL * size[0] / size[1]
    with house_style():
        figure = new_figure(
            len(records) * (_CELL + 0.12) + 0.9,
            len(rows) * (tall + 0.1) + 0.7 + 0.45 * bool(title),
        )
        panels = figure.subplots(len(rows), len(records), squeeze=False)
        for line, (name, pictures) in zip(panels, rows.items(), strict=True):
            for axes, picture in zip(line, pictures, strict=True):
                _show(axes, picture)
            line[0].text(
                -0.12, 0.5, name, transform=line[0].transAxes, ha="right", va="center",
                color=QUIET, fontsize=8.5,
            )  # fmt: skip
        for axes, label in zip(panels[0], labels, strict=True):
            axes.set_title(label, fontsize=8.5, pad=4)
        if title:
            figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold")
        save_figure(figure, path)


def _show(axes: Axes, picture: ArrayLike) -> None:
    """Colours, or shares from 0, black, to 1, white."""
    axes.set_axis_off()
    axes.imshow(picture, cmap="gray", vmin=0.0, vmax=1.0, interpolation="lanczos", aspect="equal")
