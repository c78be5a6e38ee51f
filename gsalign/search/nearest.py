"""The nearest vectors of a shard, exactly, by the part distance."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import gsalign_kernels
from gsalign.search.index_files import IndexShard, slot_visibility

# Rows that a filter leaves are copied in blocks of this size.
BLOCK_BYTES = 64 * 2**20

Found = tuple["NDArray[np.float32]", "NDArray[np.int64]"]
"""Distances and rows of the shard, ``[Q, K]`` both, the nearest first."""


def nearest(
    queries: NDArray[np.float32], shard: IndexShard, k: int, allowed: NDArray[np.bool_] | None
) -> Found:
    """Scan a shard for the nearest rows of every query.

    The whole image is a part that every embedding shows, so that any two can be compared. With one
    slot the distance is 1 - cosine.

    Args:
        queries: float32 ``[Q, D]``.
        shard: the shard; its vectors are read from their file as they go by.
        k: how many; fewer come back where there are fewer.
        allowed: which rows count, ``[N]``; None: all.
    """
    if allowed is None:
        return _scan(queries, shard, k, shard.vectors, shard.visibility)
    rows = np.flatnonzero(allowed)
    size = max(1, BLOCK_BYTES // (4 * shard.dimension))
    found: Found = _nothing(len(queries))
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        distances, places = _scan(queries, shard, k, shard.vectors[some], shard.visibility[some])
        found = merge([found, (distances, some[places])], k)
    return found


def distances_to(
    query: NDArray[np.float32], shard: IndexShard, rows: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Exact distances of one query ``[D]`` to some rows of a shard, ``[N]``."""
    sides = _sides(query[None], shard.vectors[rows], shard.visibility[rows], shard.slots)
    told: NDArray[np.float32] = gsalign_kernels.part_distance(*sides)[0].numpy()
    return told


def merge(found: list[Found], k: int) -> Found:
    """The k nearest of several; of equal distances the lower number."""
    distances = np.concatenate([part for part, _ in found], axis=1)
    numbers = np.concatenate([part for _, part in found], axis=1)
    order = np.lexsort((numbers, distances), axis=1)[:, :k]
    return np.take_along_axis(distances, order, 1), np.take_along_axis(numbers, order, 1)


def _nothing(queries: int) -> Found:
    return np.empty((queries, 0), np.float32), np.empty((queries, 0), np.int64)


def _scan(
    queries: NDArray[np.float32],
    shard: IndexShard,
    k: int,
    vectors: NDArray[np.float32],
    visibility: NDArray[np.float32],
) -> Found:
    sides = _sides(queries, vectors, visibility, shard.slots)
    distances, places = gsalign_kernels.part_search(*sides, k=min(k, len(vectors)))
    return distances.numpy(), places.numpy()


def _sides(
    queries: NDArray[np.float32],
    vectors: NDArray[np.float32],
    visibility: NDArray[np.float32],
    slots: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, gallery and their visibilities, as the operators of gsalign_kernels take them."""

    def parts(values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).unflatten(1, (slots, -1))

    seen = slot_visibility(queries, slots) if slots > 1 else np.ones((len(queries), 1), np.float32)
    return (
        parts(np.ascontiguousarray(queries)),
        parts(vectors),
        torch.from_numpy(seen),
        torch.from_numpy(visibility),
    )
