"""Drawing tiny CARGO folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_image(path: Path, seed: int, size: tuple[int, int] = (48, 24)) -> Path:
    """Write a smooth random JPEG of (height, width) ``size``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 3, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)
    image.save(path, quality=95)
    return path


def write_split(root: Path, split: str, people: dict[int, dict[int, int]], start: int = 1) -> None:
    """Write ``{identity: {camera: number of images}}`` under ``root/split``."""
    index = start
    for identity, cameras in people.items():
        for camera, count in cameras.items():
            for _ in range(count):
                name = f"Cam{camera}_{'night' if index % 3 == 0 else 'day'}_{identity}_{index}.jpg"
                write_image(root / split / f"Cam{camera}" / name, seed=index)
                index += 1
