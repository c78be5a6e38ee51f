"""Part label maps of a generated set: which body part every pixel of an image shows."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gsalign.data.synthetic.body import PARTS
from gsalign.errors import DataError

PARTS_FOLDER = "parts"


def part_label_path(path: PurePosixPath) -> PurePosixPath:
    """Where the label map of an image lies; both are below the root of the set."""
    return PARTS_FOLDER / path.with_suffix(".png")


def has_part_labels(root: Path) -> bool:
    """Whether a folder is a generated set with label maps (``write_parts``)."""
    return (root / PARTS_FOLDER).is_dir()


def read_part_labels(root: Path, image: Path) -> Tensor:
    """The label map of an image.

    Args:
        root: folder of the set.
        image: the image's file, below ``root``.

    Returns:
        ``[H, W]`` uint8, indices into ``PARTS``.

    Raises:
        DataError: the map is missing, damaged, or has labels that are no parts.
    """
    path = root / part_label_path(PurePosixPath(image.relative_to(root).as_posix()))
    try:
        with Image.open(path) as file:
            labels = torch.from_numpy(np.array(file.convert("L")))
    except OSError as error:
        raise DataError(
            f"{path}: no part labels of {image.name}: {error}; generate the set with "
            "write_parts=true"
        ) from error
    if labels.numel() and int(labels.max()) >= len(PARTS):
        raise DataError(f"{path} has label {int(labels.max())}, of {len(PARTS)} parts")
    return labels
