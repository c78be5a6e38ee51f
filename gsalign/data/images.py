"""The images of a split: checking them, decoding them on demand, and keeping decoded ones."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from gsalign.data.decoding import read_image, resize
from gsalign.data.packed import PackedImages
from gsalign.data.records import Split
from gsalign.errors import DataError
from gsalign.memory import available_memory

OnBroken = Literal["error", "skip"]
Cache = Literal["none", "memory", "packed"]

# Nobody can be told from fewer pixels than these in height or width.
_SMALLEST = 8
_FORMATS = {".jpg": ("JPEG", "MPO"), ".jpeg": ("JPEG", "MPO"), ".png": ("PNG",)}


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
    try:
        image = Image.open(file)
    except Exception as error:  # Pillow's plugins raise anything, and torchvision read the pixels
        return f"image {file} is refused by Pillow: {' '.join(str(error).split())}"
    with image:
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

    With ``cache="packed"`` they are read from a file, see ``gsalign.data.packed``.

    Args:
        paths: the files.
        size: ``(height, width)`` of the images handed out.
        cache: ``"none"``, ``"memory"`` or ``"packed"``.
        folder: of packed files.
        name: of the split, in the name of its packed file.

    Raises:
        DataError: the cache does not fit into the memory that is available now, or the packed file
            cannot be made.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        size: tuple[int, int],
        *,
        cache: Cache = "none",
        folder: Path | None = None,
        name: str = "images",
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
        self._packed: PackedImages | None = None
        if cache == "packed" and self.paths:
            if folder is None:
                raise DataError("cache='packed' needs a folder for its files")
            self._packed = PackedImages(self.paths, self.size, folder, name)
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
        names = ("paths", "size", "cache", "_packed")
        return {name: self.__dict__[name] for name in names}

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
        if self._packed is not None and (pixels := self._packed[index]) is not None:
            return pixels
        if self._pixels is None or self._filled is None:
            return resize(read_image(self.paths[index]), self.size)
        if not self._filled[index]:
            self._pixels[index].copy_(resize(read_image(self.paths[index]), self.size))
            # Set only after the pixels are there; two processes that decode the same image at
            # once write the same bytes.
            self._filled[index] = 1
        return self._pixels[index]
