"""Whether a command has written a picture."""

from __future__ import annotations

from pathlib import Path

from PIL import Image


def assert_picture(path: Path, least: int = 100) -> None:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) >= least
        # More than one colour: something is drawn.
        assert any(low < high for low, high in picture.convert("RGB").getextrema())
