"""Vectors in ``.npy`` files: written block by block, read through mapped memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gsalign.errors import DataError
from gsalign.files import atomic_write

Blocks = Iterable["NDArray[np.float32]"]


def write_vectors(path: Path, shape: tuple[int, int], blocks: Blocks) -> None:
    """Write one float32 array, atomically.

    Not through mapped memory: where the disk is full, a page that cannot be stored ends the process
    (SIGBUS); a write that cannot is an ``OSError``.

    Args:
        path: the ``.npy`` file.
        shape: of all blocks together.
        blocks: ``[B, D]``, rows in order.
    """
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False}
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {**header, "shape": shape})
        for block in blocks:
            file.write(np.ascontiguousarray(block, np.float32).data)


def open_vectors(path: Path, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Map an array of vectors into memory; what one writes to it does not reach the file.

    Raises:
        DataError: the file is missing or no float32 array of this shape.
    """
    try:
        vectors: NDArray[np.float32] = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if vectors.dtype != np.float32 or vectors.shape != shape:
        raise DataError(
            f"{path} is {vectors.dtype} {list(vectors.shape)}, wanted float32 {list(shape)}: the "
            "folder is damaged, make it again"
        )
    return vectors
