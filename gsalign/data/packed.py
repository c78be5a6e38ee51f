"""A file of decoded, resized images, from which training reads without decoding anything.

A NumPy array uint8 ``[N, 1 + 3 * H * W]``: whether the image could be read, then its pixels. Its
name carries two fingerprints: of the list of files it was made of with the size of its images, and
of the state they were in (size, time of the last change). So one which is out of date is never
found, and is replaced; other parts of a data set, or other sizes, have files of their own.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor

from gsalign.data.decoding import read_image, resize
from gsalign.errors import DataError
from gsalign.files import atomic_write

logger = logging.getLogger(__name__)

FORMAT = "gsalign-packed-1"
BLOCK = 1024
"""Images handed to the threads at a time, so that Ctrl-C waits for no more."""


def fingerprints(paths: Sequence[Path], size: tuple[int, int]) -> tuple[str, str]:
    """Which files at which size, and in what state they are; 12 hexadecimal digits each.

    Raises:
        DataError: a file is missing.
    """
    which = hashlib.sha256(f"{FORMAT} {size[0]}x{size[1]}\n".encode())
    state = hashlib.sha256()
    for path in paths:
        try:
            status = os.stat(path)
        except OSError as error:
            raise DataError(f"image {path} cannot be read: {error.strerror}") from None
        which.update(f"{path.absolute()}\n".encode())
        state.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
    return which.hexdigest()[:12], state.hexdigest()[:12]


class PackedImages:
    """Images of a list of files, read from a packed file that is made if it is not there.

    Several processes may ask for the same one: the first makes it, the others wait.

    Args:
        paths: the files.
        size: ``(height, width)``.
        folder: of packed files; made if it is missing.
        name: of the split, for the file's name.

    Raises:
        DataError: a file is missing, the folder cannot be written or has too little space, or the
            packed file is damaged.
    """

    def __init__(
        self, paths: Sequence[Path], size: tuple[int, int], folder: Path, name: str
    ) -> None:
        self.size = size
        which, state = fingerprints(paths, size)
        prefix = re.sub(r"[^\w-]+", "-", f"{name}-{size[0]}x{size[1]}-{which}")
        self.path = folder / f"{prefix}-{state}.npy"
        shape = (len(paths), 1 + 3 * size[0] * size[1])
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not self.path.is_file():
                with (folder / f"{prefix}.lock").open("w") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    if not self.path.is_file():
                        self._remove(f".{prefix}-*.npy", "which a killed process left behind")
                        _write(self.path, paths, size, shape)
                        self._remove(f"{prefix}-*.npy", "which is out of date")
        except OSError as error:
            raise DataError(
                f"packed images cannot be written to {folder}: {error.strerror or error}; set "
                "data.cache_folder to a folder that can be written, or data.cache=none"
            ) from None
        self._rows = self._mapped()
        if self._rows is None or self._rows.shape != shape or self._rows.dtype != np.uint8:
            raise DataError(
                f"{self.path} is damaged, wanted uint8 {list(shape)}: remove it, and it is made "
                "again"
            )

    def _mapped(self) -> NDArray[np.uint8] | None:
        try:
            rows: NDArray[np.uint8] = open_memmap(self.path, mode="r")
        except ValueError:  # empty, cut off, or with objects in it
            return None
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror or error}") from None
        return rows

    def _remove(self, pattern: str, reason: str) -> None:
        for other in self.path.parent.glob(pattern):
            if other != self.path:
                logger.info("removed %s, %s", other, reason)
                other.unlink(missing_ok=True)

    def __getstate__(self) -> dict[str, object]:
        """Leave the mapping behind; whoever gets the object maps the file itself."""
        return {"path": self.path, "size": self.size}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Map the file again."""
        self.__dict__.update(state)
        self._rows = self._mapped()

    def __getitem__(self, index: int) -> Tensor | None:
        """Image ``index``, uint8 ``[3, height, width]``, a copy; None if it could not be read."""
        assert self._rows is not None
        row = self._rows[index]
        return torch.from_numpy(row[1:].copy()).view(3, *self.size) if row[0] else None


def _write(
    path: Path, paths: Sequence[Path], size: tuple[int, int], shape: tuple[int, int]
) -> None:
    needed, free = shape[0] * shape[1], shutil.disk_usage(path.parent).free
    if needed > free:
        raise DataError(
            f"packed images need {needed / 2**30:.1f} GiB in {path.parent}, {free / 2**30:.1f} GiB "
            "are free; set data.cache_folder to another disk, or data.cache=none"
        )
    logger.info("packing %d images into %s, %.0f MiB", shape[0], path, needed / 2**20)
    threads = max(1, len(os.sched_getaffinity(0)))
    with atomic_write(path) as temporary, ThreadPoolExecutor(threads) as pool:
        rows = open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        with temporary.open("r+b") as file:
            # All the space now, or an error: a mapping that meets a full disk kills the process.
            os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)

        def put(index: int) -> None:
            try:
                pixels = resize(read_image(paths[index]), size)
            except DataError:
                return  # the row's zeros say so, and whoever asks for it is told why
            rows[index, 1:] = pixels.numpy().reshape(-1)
            rows[index, 0] = 1

        for first in range(0, len(paths), BLOCK):
            list(pool.map(put, range(first, min(first + BLOCK, len(paths)))))
        rows.flush()
