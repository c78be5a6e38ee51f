"""Drawing tiny CARGO folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gsalign.data.synthetic import PARTS, UNKNOWN, group_labels


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


def write_maps(root: Path, images: Sequence[Path]) -> None:
    """Write a label map of one part for each image, unknown in the first columns."""
    for number, image in enumerate(images):
        path = root / "parts" / image.relative_to(root).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        labels = np.full((48, 24), number % len(PARTS), dtype=np.uint8)
        labels[:, :2] = UNKNOWN
        Image.fromarray(labels).save(path)


def labels_of(indices: torch.Tensor, groups: int) -> torch.Tensor:
    """The part, in groups, that ``write_maps`` gave to each image."""
    return group_labels(torch.remainder(indices, len(PARTS)).to(torch.uint8), groups)
