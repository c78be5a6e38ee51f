"""Attention maps: how much each patch gives to the class and to the view token, over the images."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2.functional import rgb_to_grayscale

from gsalign.data import ImageRecord
from gsalign.model import GSAlign
from gsalign.visualize.looking import aligned_note, image_label, look_at
from gsalign.visualize.rollout import HEADS, Heads, attention_inputs, maps_of, roll_out
from gsalign.visualize.style import QUIET, house_style, new_figure, save_figure

# Dark to light in one sweep: lightness alone tells it, to any eye and on a grey print.
_HEAT = "inferno"
_OPACITY = 0.6
_LEAST_SCALE = 2.0


def attention_maps(
    network: GSAlign,
    records: Sequence[ImageRecord],
    path: str | os.PathLike[str],
    *,
    heads: Heads = "mean",
    title: str = "",
) -> None:
    """Draw images with the attention roll-out of the class and of the view token over them.

    Colours say how much of a token's content comes from a patch, in multiples of what it would be
    if all patches gave alike; see :mod:`gsalign.visualize.rollout`.

    Args:
        network: whose attention; its device and mode are kept.
        records: the images, one column each.
        path: PNG to write.
        heads: how the heads of a layer become one, ``"mean"`` or ``"max"``.
        title: above the picture.

    Raises:
        ValueError: there is no image, or ``heads`` is something else.
        DataError: an image cannot be read.
    """
    if not records:
        raise ValueError("records is empty: there is no attention to draw")
    if heads not in HEADS:
        raise ValueError(f"heads is {heads!r}; wanted one of {', '.join(HEADS)}")
    size = network.config.image_size
    with attention_inputs(network) as inputs:
        pictures, output = look_at(network, records)
    flow = roll_out(network, inputs, output, heads=heads)
    rows, columns = network.config.grid
    ratios = (maps_of(flow, (rows, columns)) * (rows * columns)).cpu().numpy()
    # Below this scale an even map would look as if it had peaks.
    scale = Normalize(0.0, max(_LEAST_SCALE, float(np.quantile(ratios, 0.99))))

    cell = 1.15
    tall = cell * size[0] / size[1]
    with house_style():
        figure = new_figure(len(records) * (cell + 0.12) + 1.7, 3 * tall + 1.0 + 0.4 * bool(title))
        panels = figure.subplots(3, len(records), squeeze=False)
        for number, record in enumerate(records):
            column = panels[:, number]
            for axes in column:
                axes.set_axis_off()
            column[0].imshow(pictures[number].numpy(), interpolation="lanczos")
            column[0].set_title(
                image_label(record), loc="center", fontsize=8.5, fontweight="normal", pad=4
            )
            for axes, ratio in zip(column[1:], ratios[number], strict=True):
                _cover(axes, pictures[number], ratio, scale)
        for axes, name in zip(panels[:, 0], ("image", "class token", "view token"), strict=True):
            label = axes.text(-0.06, 0.5, name, transform=axes.transAxes, rotation=90)
            label.set(ha="right", va="center", fontsize=9, fontweight="bold")
        bar = figure.colorbar(
            ScalarMappable(scale, _HEAT),
            ax=panels,
            shrink=0.6,
            anchor=(0.0, 0.02),
            fraction=0.04,
            aspect=30,
            pad=0.02,
            extend="max",
        )
        bar.set_label("times an even share", fontsize=8.5)
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.ax.tick_params(labelsize=8, length=0)
        notes = [f"roll-out of attention, {heads} over heads", aligned_note(network)]
        figure.supxlabel("; ".join(filter(None, notes)), fontsize=8.5, color=QUIET)
        if title:
            figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold")
        save_figure(figure, path)


def _cover(axes: Axes, picture: Tensor, ratio: NDArray[np.float32], scale: Normalize) -> None:
    """An image in grey under the colours of its map."""
    grey = rgb_to_grayscale(picture.permute(2, 0, 1))[0].numpy()
    axes.imshow(grey, cmap="gray", vmin=0, vmax=255, interpolation="lanczos")
    height, width = grey.shape
    axes.imshow(
        ratio, cmap=_HEAT, norm=scale, alpha=_OPACITY, interpolation="bicubic",
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
    )  # fmt: skip
