"""How much memory an index will take, told before it is made."""

from __future__ import annotations

import math

from gsalign.errors import GSAlignError
from gsalign.memory import available_memory
from gsalign.search.index_files import BLOCK_ROWS, IndexSettings

_FLOAT, _HALF, _EDGE, _ID = 4, 2, 4, 8
# Python's texts: a path of 55 letters and three labels take 280 bytes, and 420 while they are read.
_TABLE_ROW = 500


class MemoryLimitError(GSAlignError):
    """Something would take more memory than there is; the message says how to need less."""


def number_of_lists(settings: IndexSettings, count: int) -> int:
    """Lists of an ``ivfpq`` over so many images: as set, or four times the root.

    Never so many that k-means has fewer than 39 images for each, FAISS's own lower bound.
    """
    wanted = settings.lists or int(4 * math.sqrt(count))
    return max(1, min(wanted, count // 39))


def training_rows(settings: IndexSettings, count: int) -> int:
    """Images that an ``ivfpq`` learns its lists and codes from."""
    return min(count, max(256 * number_of_lists(settings, count), 256 * 256))


def build_bytes(settings: IndexSettings, count: int, dimension: int, code_size: int) -> int:
    """Most bytes in memory while an index is made, shard after shard.

    Args:
        settings: of the index.
        count: images in all.
        dimension: length of an embedding.
        code_size: bytes of a code of ``ivfpq``.
    """
    shard = min(count, settings.shard_size)
    needed = count * _TABLE_ROW + 2 * BLOCK_ROWS * dimension * _FLOAT
    if settings.kind == "hnsw":
        # Edges of the lowest layer, twice as many as of the others, which hold few nodes.
        needed += shard * (dimension * _HALF + 2 * settings.neighbours * _EDGE + 2 * _ID)
    if settings.kind == "ivfpq":
        needed += shard * (code_size + _ID)
        needed += number_of_lists(settings, count) * dimension * _FLOAT
        # The sample, and k-means' own copy of it.
        needed += 2 * training_rows(settings, count) * dimension * _FLOAT
    return needed


def require_memory(needed: int, what: str, advice: str) -> None:
    """Refuse what does not fit.

    Args:
        needed: bytes.
        what: is about to be done.
        advice: how to need less.

    Raises:
        MemoryLimitError: it does not fit into the memory that is available now.
    """
    available = available_memory()
    if available is not None and needed > available:
        raise MemoryLimitError(
            f"{what} needs about {needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB "
            f"are available: {advice}"
        )
