"""Part masks: what each part of the network covers, drawn over the images."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch
from torch import Tensor
from torch.nn import functional as F

from gsalign.data import ImageRecord
from gsalign.data.synthetic import PART_GROUPS, part_groups
from gsalign.model import GSAlign
from gsalign.visualize.looking import aligned_note, image_label, look_at
from gsalign.visualize.style import FAINT, INK, SERIES, house_style, new_figure, save_figure

OPACITY = 0.72
_NOTE = "colours: the parts, uncoloured: background, bars: how visible each part is"


def part_colour(part: int) -> str:
    """Colour of a part, counted from 0; the same in every picture."""
    return SERIES[part % len(SERIES)]


def part_masks(
    network: GSAlign,
    records: Sequence[ImageRecord],
    path: str | os.PathLike[str],
    *,
    title: str = "",
) -> None:
    """Draw images with their part masks over them and the visibility of every part below.

    A part's colour is as strong as its mask; where the background has the patch, the image shows.

    Args:
        network: whose masks; its device and mode are kept.
        records: the images, one column each.
        path: PNG to write.
        title: above the picture.

    Raises:
        ValueError: the network has no parts, or there is no image.
        DataError: an image cannot be read.
    """
    if network.parts is None or not records:
        what = "the network has no parts" if network.parts is None else "records is empty"
        raise ValueError(f"{what}: there is no mask to draw")
    size, parts = network.config.image_size, network.config.parts
    pictures, output = look_at(network, records)
    assert output.parts is not None
    masks = output.parts.masks.unflatten(2, network.config.mask_grid).float().cpu()
    covered = _cover(pictures.permute(0, 3, 1, 2) / 255, masks, size)
    visibility = output.parts.visibility.cpu()

    cell = 1.15
    tall = cell * size[0] / size[1]
    with house_style():
        figure = new_figure(
            len(records) * (cell + 0.12) + 0.9, 2 * tall + 1.2 + 0.45 * bool(title) + 0.3
        )
        panels = figure.subplots(3, len(records), squeeze=False, height_ratios=[tall, tall, 0.55])
        for number, record in enumerate(records):
            for axes, picture in zip(
                panels[:2, number], (pictures[number].numpy(), covered[number]), strict=True
            ):
                axes.set_axis_off()
                axes.imshow(picture, interpolation="lanczos", aspect="equal")
            panels[0, number].set_title(image_label(record), fontsize=8.5, pad=4)
            _bars(panels[2, number], visibility[number], first=number == 0)
        figure.legend(
            handles=[
                Patch(color=part_colour(part), label=name)
                for part, name in enumerate(_names(network))
            ],
            title="; ".join(filter(None, (_NOTE, aligned_note(network)))),
            title_fontproperties={"size": 8.5, "weight": "normal"},
            loc="outside lower center",
            ncols=parts,
            frameon=False,
            fontsize=8.5,
        )
        if title:
            figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold")
        save_figure(figure, path)


def _names(network: GSAlign) -> Sequence[str]:
    """What the parts are: body parts where the masks learnt from label maps, else numbers."""
    parts = network.config.parts
    if network.config.losses.part_labels and parts in PART_GROUPS:
        return tuple(part_groups(parts))
    return [f"part {part}" for part in range(parts)]


def _cover(images: Tensor, masks: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Images ``[B, 3, H, W]`` in 0 .. 1 under the colours of their masks, ``[B, H, W, 3]``."""
    weights = F.interpolate(masks, size=size, mode="nearest")[:, 1:]
    colours = torch.tensor([to_rgb(part_colour(part)) for part in range(weights.shape[1])])
    paint = torch.einsum("bphw,pc->bchw", weights, colours)
    share = weights.sum(dim=1, keepdim=True)
    covered = images * (1 - OPACITY * share) + OPACITY * paint
    picture: np.ndarray = covered.clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return picture


def _bars(axes: Axes, visibility: Tensor, *, first: bool) -> None:
    parts = len(visibility)
    axes.bar(range(parts), visibility.tolist(), color=[part_colour(p) for p in range(parts)])
    axes.set_ylim(0, 1)
    axes.set_xticks([])
    axes.set_yticks([0, 1])
    axes.tick_params(labelleft=first, labelsize=7, length=0)
    axes.grid(axis="x", visible=False)
    axes.spines["left"].set_color(FAINT)
    axes.spines["bottom"].set_color(INK)
