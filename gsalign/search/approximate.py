"""FAISS: graphs and inverted lists over the vectors of a shard, for a short list of candidates.

FAISS trusts the files it reads. Only files whose size and sha256 are those of the manifest are
given to it, which guards against damage and mixed-up folders; it cannot guard against somebody who
may write to the folder.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsalign.errors import ConfigError, DataError
from gsalign.extras import import_extra
from gsalign.files import atomic_write
from gsalign.search.budget import number_of_lists
from gsalign.search.documents import FileRecord, check_file, record_file
from gsalign.search.index_files import IndexSettings

logger = logging.getLogger(__name__)

_BITS = 8
_LEAST_IMAGES = 2**_BITS
_ENOUGH_IMAGES = 39 * 2**_BITS


def code_size(settings: IndexSettings, dimension: int) -> int:
    """Bytes of a code: as set, or about an eighth of the dimension.

    Raises:
        ConfigError: it does not divide the dimension.
    """
    if settings.code_size:
        if dimension % settings.code_size:
            raise ConfigError(
                f"code_size is {settings.code_size}; wanted a divisor of {dimension}, the length "
                "of an embedding"
            )
        return settings.code_size
    largest = max(1, dimension // 8)
    return max(size for size in range(1, largest + 1) if dimension % size == 0)


def train(settings: IndexSettings, sample: NDArray[np.float32], count: int) -> Any:
    """An empty ``ivfpq`` that has learnt lists and codes.

    Args:
        settings: of the index.
        sample: float32 ``[N, D]``, some of the vectors.
        count: images in all.

    Raises:
        DataError: there are too few images.
        MissingExtraError: FAISS is not installed.
    """
    faiss = import_extra("faiss")
    dimension = sample.shape[1]
    if count < _LEAST_IMAGES:
        raise DataError(
            f"ivfpq learns {_LEAST_IMAGES} codes and has {count} images: take exact, which is fast "
            "at this size"
        )
    if count < _ENOUGH_IMAGES:
        logger.warning(
            "ivfpq learns little from %d images; exact is better and fast at this size", count
        )
    lists = number_of_lists(settings, count)
    quantizer = faiss.IndexFlatIP(dimension)
    index = faiss.IndexIVFPQ(
        quantizer,
        dimension,
        lists,
        code_size(settings, dimension),
        _BITS,
        faiss.METRIC_INNER_PRODUCT,
    )
    for clustering in (index.cp, index.pq.cp):
        # We have said it better.
        clustering.min_points_per_centroid = 1
    index.train(sample)
    return index


def fill(
    settings: IndexSettings,
    trained: Any,
    blocks: Iterable[NDArray[np.float32]],
    dimension: int,
) -> Any:
    """An index over the vectors of one shard; its ids are the rows.

    Args:
        settings: of the index.
        trained: an empty ``ivfpq``; None for ``hnsw``.
        blocks: the vectors.
        dimension: length of an embedding.
    """
    faiss = import_extra("faiss")
    if settings.kind == "ivfpq":
        index = faiss.clone_index(trained)
    else:
        index = faiss.IndexHNSWSQ(
            dimension,
            faiss.ScalarQuantizer.QT_fp16,
            settings.neighbours,
            faiss.METRIC_INNER_PRODUCT,
        )
        index.hnsw.efConstruction = settings.construction
        # Half precision has nothing to learn, but FAISS wants to be asked.
        index.train(np.zeros((1, dimension), np.float32))
    for block in blocks:
        index.add(block)
    return index


def write(index: Any, path: Path) -> FileRecord:
    """Write an index, atomically.

    Raises:
        OSError: FAISS cannot, probably because the disk is full.
    """
    faiss = import_extra("faiss")
    with atomic_write(path) as temporary:
        try:
            faiss.write_index(index, str(temporary))
        except RuntimeError as error:
            raise OSError(f"{path} cannot be written: {error}") from None
    return record_file(path)


def read(path: Path, record: FileRecord) -> Any:
    """Map an index into memory, if it is the file that was written.

    Raises:
        DataError: it is not.
        MissingExtraError: FAISS is not installed.
    """
    faiss = import_extra("faiss")
    check_file(path, record)
    # Mapped: pages come in as they are visited, so that an index may exceed the memory.
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)


def candidates(
    index: Any,
    queries: NDArray[np.float32],
    count: int,
    effort: int,
    allowed: NDArray[np.bool_] | None,
) -> list[NDArray[np.int64]]:
    """Rows of a shard that are probably near, per query, in no order that counts.

    Args:
        index: from :func:`read` or :func:`fill`.
        queries: float32 ``[Q, D]``.
        count: how many at most.
        effort: lists visited, or candidates kept on the walk; 0: a sixteenth of the lists and 8 at
            least, or twice ``count``.
        allowed: which rows count, ``[N]``; None: all.
    """
    faiss = import_extra("faiss")
    selector = None
    if allowed is not None:
        bits = np.packbits(allowed, bitorder="little")
        selector = faiss.IDSelectorBitmap(bits)
    if isinstance(index, faiss.IndexIVF):
        probes = effort or max(8, index.nlist // 16)
        parameters = faiss.SearchParametersIVF(sel=selector, nprobe=min(probes, index.nlist))
    else:
        parameters = faiss.SearchParametersHNSW(sel=selector, efSearch=max(effort or 2 * count, 16))
    count = min(count, index.ntotal)
    _, rows = index.search(np.ascontiguousarray(queries), count, params=parameters)
    return [np.sort(found[found >= 0]) for found in rows]
