"""What tests of pictures share: a small network, and reading what was put on a figure."""

from __future__ import annotations

import matplotlib
import torch
from matplotlib.figure import Figure
from PIL import Image

from gsalign.model import GSAlign, ModelConfig


def colours(path) -> set[tuple[int, int, int]]:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return {colour for _, colour in picture.convert("RGB").getcolors(2**24)}


def rgb(text: str) -> tuple[int, int, int]:
    return tuple(int(text[i : i + 2], 16) for i in (1, 3, 5))


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def network(**settings) -> GSAlign:
    config = ModelConfig(
        image_size=(32, 16), patch_size=8, width=24, depth=2, num_heads=2, num_identities=5,
        **{"ltps": {"hidden": (8, 4)}, **settings},
    )  # fmt: skip
    torch.manual_seed(0)
    return GSAlign(config)
