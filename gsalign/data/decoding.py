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
_SIXTEEN_BITS = 0xFFFF


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """Decode an image file.

    Args:
        path: JPEG, PNG, or whatever else Pillow reads. Grey, palette and CMYK images become RGB,
            16 bits become 8 by rounding, an alpha channel is dropped, an EXIF orientation is not
            applied (as in the published code).

    Returns:
        RGB, uint8 ``[3, H, W]``.

    Raises:
        DataError: the file is missing, empty, truncated or not an image, or its pixels are
            floating-point numbers.
    """
    file = Path(path)
    if file.suffix.lower() in _FAST_SUFFIXES:
        try:
            return _eight_bits(decode_image(str(file), mode=ImageReadMode.RGB))
        except (RuntimeError, ValueError):
            # Pillow knows more colour models and gives the better message; let it judge.
            pass
    try:
        with Image.open(file) as image:
            return image_pixels(image)
    except FileNotFoundError:
        raise DataError(f"image {file} does not exist") from None
    except Exception as error:  # Pillow's plugins raise anything, struct.error included
        if file.is_file() and file.stat().st_size == 0:
            raise DataError(f"image {file} is empty (0 bytes)") from None
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = reason.removesuffix(f" {str(file)!r}")
        raise DataError(f"image {file} cannot be read: {reason}") from None


def image_pixels(image: Image.Image) -> Tensor:
    """RGB pixels of an image of Pillow, with the conversions of :func:`read_image`.

    Returns:
        uint8 ``[3, H, W]``.

    Raises:
        ValueError: the pixels are floating-point numbers, whose range nobody knows.
        OSError: the image is not yet decoded, and damaged.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        # Pillow would cut 16 bits of grey off at 255 instead of scaling them.
        grey = np.array(image).clip(0, _SIXTEEN_BITS).astype(np.int32)
        return _eight_bits(torch.from_numpy(grey)).expand(3, -1, -1).contiguous()
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def _eight_bits(pixels: Tensor) -> Tensor:
    """Round pixels of 16 bits to 8; white stays white. Those of 8 bits are returned as they are."""
    if pixels.dtype == torch.uint8:
        return pixels
    return ((pixels.int() + 128) // 257).to(torch.uint8)


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
