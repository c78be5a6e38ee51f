"""Reading image files into uint8 tensors, and keeping decoded ones in memory."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from gsalign.data.records import Split
from gsalign.errors import DataError
from gsalign.memory import available_memory

OnBroken = Literal["error", "skip"]
Cache = Literal["none", "memory"]

# The container formats that torchvision decodes; it is about twice as fast as Pillow on JPEG.
_FAST_SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})
_SIXTEEN_BITS = 0xFFFF
# Nobody can be told from fewer pixels than these in height or width.
_SMALLEST = 8
_FORMATS = {".jpg": ("JPEG", "MPO"), ".jpeg": ("JPEG", "MPO"), ".png": ("PNG",)}


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


@dataclass(frozen=True)
class ImageCheck:
    """What opening every image of a split found.

    Attributes:
        split: the split without the broken images.
        broken: one line per broken image, naming the file and the reason.
        odd: one line per image that can be read but is not what one expects, see ``oddity``.
    """

    split: Split
    broken: tuple[str, ...]
    odd: tuple[str, ...] = ()


def oddity(path: str | os.PathLike[str]) -> str:
    """Say what is unusual about an image that can be read; only its header is looked at.

    Args:
        path: the file.

    Returns:
        One line that names the file; empty for an RGB or grey image of 8 bits, of at least 8 x 8
        pixels, whose format is that of its suffix.
    """
    file = Path(path)
    with Image.open(file) as image:
        width, height = image.size
        found = []
        if min(width, height) < _SMALLEST:
            found.append(f"has {width} x {height} pixels")
        if image.mode.startswith("I") or "16B" in str(image.tile):
            found.append("has 16 bits per channel; they are read as 8")
        elif image.mode not in ("RGB", "L"):
            found.append(f"is {image.mode}; it is read as RGB")
        formats = _FORMATS.get(file.suffix.lower(), ())
        if formats and image.format not in formats:
            found.append(f"is a {image.format} named {file.suffix}")
    return f"image {file} {', '.join(found)}" if found else ""


def check_images(
    split: Split,
    *,
    on_broken: OnBroken = "skip",
    threads: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> ImageCheck:
    """Decode every image of a split once.

    Args:
        split: the images.
        on_broken: ``"skip"`` leaves broken images out; ``"error"`` raises when there are any.
        threads: how many files are decoded at a time.
        progress: called with (images done, images in all).

    Returns:
        The usable images and the list of the others.

    Raises:
        DataError: ``on_broken`` is ``"error"`` and an image is broken; it counts and names them.
    """

    def look(path: Path) -> tuple[str, str]:
        try:
            read_image(path)
        except DataError as error:
            return str(error), ""
        return "", oddity(path)

    problems: list[str] = []
    odd: list[str] = []
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for problem, unusual in pool.map(look, split.paths):
            problems.append(problem)
            odd += filter(None, [unusual])
            if progress is not None:
                progress(len(problems), len(split))
    broken = tuple(text for text in problems if text)
    if broken and on_broken == "error":
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise DataError(
            f"{len(broken)} of {len(split)} images of {split.name} are broken: "
            f"{'; '.join(broken[:5])}{more}. Replace them, or set on_broken to 'skip'"
        )
    good = tuple(record for record, text in zip(split.records, problems, strict=True) if not text)
    return ImageCheck(Split(split.name, good), broken, tuple(odd))


class ImageStore:
    """The images of a list of files at one size, decoded on demand and kept if asked.

    With ``cache="memory"`` the resized images (uint8, 3·H·W bytes each) are kept in one anonymous
    shared mapping made before the workers are forked, so whichever process decodes an image first
    does so for all. It is not in ``/dev/shm``, whose size containers like to limit. A process that
    is spawned instead of forked gets a private cache.

    Args:
        paths: the files.
        size: ``(height, width)`` of the images handed out.
        cache: ``"none"`` or ``"memory"``.

    Raises:
        DataError: the cache does not fit into the memory that is available now.
    """

    def __init__(
        self, paths: Sequence[Path], size: tuple[int, int], *, cache: Cache = "none"
    ) -> None:
        self.paths = tuple(paths)
        self.size = (int(size[0]), int(size[1]))
        self.cache = cache
        if cache == "memory":
            needed, available = len(self.paths) * self._bytes_per_image, available_memory()
            if available is not None and needed > available:
                raise DataError(
                    f"cache='memory' needs {needed / 2**30:.1f} GiB for {len(self.paths)} images, "
                    f"{available / 2**30:.1f} GiB are available; use cache='none' or smaller images"
                )
        self._allocate()

    @property
    def _bytes_per_image(self) -> int:
        return 3 * self.size[0] * self.size[1]

    def _allocate(self) -> None:
        self._pixels: Tensor | None = None
        self._filled: Tensor | None = None
        if self.cache != "memory" or not self.paths:
            return
        count = len(self.paths)
        # torch.frombuffer keeps the mapping alive.
        self._pixels = torch.frombuffer(
            mmap.mmap(-1, count * self._bytes_per_image), dtype=torch.uint8
        ).view(count, 3, *self.size)
        self._filled = torch.frombuffer(mmap.mmap(-1, count), dtype=torch.uint8)

    def __getstate__(self) -> dict[str, object]:
        """Leave the mapping behind: it means nothing to a process that was not forked."""
        return {"paths": self.paths, "size": self.size, "cache": self.cache}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Restore the settings and start with an empty cache."""
        self.__dict__.update(state)
        self._allocate()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """Return image ``index``, uint8 ``[3, height, width]``; raises DataError if it is broken.

        With the memory cache this is a view into it: do not write to it.
        """
        if self._pixels is None or self._filled is None:
            return resize(read_image(self.paths[index]), self.size)
        if not self._filled[index]:
            self._pixels[index].copy_(resize(read_image(self.paths[index]), self.size))
            # Set only after the pixels are there; two processes that decode the same image at
            # once write the same bytes.
            self._filled[index] = 1
        return self._pixels[index]
