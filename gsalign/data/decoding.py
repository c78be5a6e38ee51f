"""Reading an image file into a uint8 tensor, and resizing it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from gsalign.errors import DataError

# The container formats that torchvision decodes; it is about twice as fast as Pillow on JPEG.
_FAST_SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """Decode an image file.

    Args:
        path: JPEG, PNG, or whatever else Pillow reads. Grey and palette images become RGB, an
            alpha channel is dropped, an EXIF orientation is not applied (as in the published code).

    Returns:
        RGB, uint8 ``[3, H, W]``.

    Raises:
        DataError: the file is missing, empty, truncated or not an image.
    """
    file = Path(path)
    if file.suffix.lower() in _FAST_SUFFIXES:
        try:
            return decode_image(str(file), mode=ImageReadMode.RGB)
        except (RuntimeError, ValueError):
            # Pillow knows more colour models and gives the better message; let it judge.
            pass
    try:
        with Image.open(file) as image:
            pixels = np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise DataError(f"image {file} does not exist") from None
    except Exception as error:  # Pillow's plugins raise anything, struct.error included
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"image {file} cannot be read: {reason}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize with an antialiased bicubic filter; an image of that size already is returned as is.

    Args:
        image: uint8 or float ``[..., 3, H, W]``.
        size: ``(height, width)``.

    Returns:
        The same type, ``[..., 3, height, width]``.
    """
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return functional.resize(
        image, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True
    )
