"""Distances between embeddings, whole or in blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Union

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

import gsalign_kernels

Metric = Literal["cosine", "euclidean"]
Array = Union[Tensor, "NDArray[np.floating]"]

# A block of distances and its copy on the CPU stay far below the size of the embeddings.
BLOCK_BYTES = 64 * 2**20


def as_tensor(values: Array, name: str = "values") -> Tensor:
    """Return a NumPy array as a tensor that shares its memory, and a tensor detached.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(values, Tensor):
        return values.detach()
    if isinstance(values, np.ndarray):
        # A read-only array is only read here, but torch warns about every one.
        return torch.from_numpy(values if values.flags.writeable else values.copy())
    raise TypeError(f"{name} is {type(values).__name__}; wanted a NumPy array or a tensor")


def pairwise_distances(
    query: Array,
    gallery: Array,
    metric: Metric = "cosine",
    *,
    visibility: tuple[Array, Array] | None = None,
) -> Tensor:
    """Return the distances of every query to every gallery embedding.

    Args:
        query: ``[Q, D]``, or ``[Q, P, D]`` with ``visibility``.
        gallery: ``[G, D]``, or ``[G, P, D]``.
        metric: ``"cosine"``, 1 - cosine similarity, in 0 .. 2; or ``"euclidean"``.
        visibility: of the parts of query ``[Q, P]`` and gallery ``[G, P]``; the distance is then
            that of :func:`gsalign_kernels.part_distance`.

    Returns:
        ``[Q, G]`` on the device of ``query``, float32 (float64 if the embeddings are).

    Raises:
        ValueError: a shape does not fit, or the metric is unknown.
    """
    blocks = list(distance_blocks(query, gallery, metric, visibility=visibility))
    if not blocks:
        return torch.zeros(0, len(gallery))
    return torch.cat([block for _, block in blocks])


def distance_blocks(
    query: Array,
    gallery: Array,
    metric: Metric = "cosine",
    *,
    visibility: tuple[Array, Array] | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[tuple[int, Tensor]]:
    """Yield the distance matrix in blocks of rows, so that the whole never exists.

    Args:
        query: as in ``pairwise_distances``, as all but the last.
        gallery: likewise.
        metric: likewise.
        visibility: likewise.
        block_bytes: the largest block; it has one row at least.

    Yields:
        (number of the first row, block ``[rows, G]``).

    Raises:
        ValueError: a shape does not fit, or the metric is unknown.
    """
    q, g = as_tensor(query, "query"), as_tensor(gallery, "gallery")
    if visibility is not None:
        yield from _part_blocks(q, g, metric, visibility, block_bytes)
        return
    if q.dim() != 2 or g.dim() != 2 or q.shape[1] != g.shape[1]:
        raise ValueError(
            f"query {tuple(q.shape)} and gallery {tuple(g.shape)}: wanted [Q, D] and [G, D]"
        )
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"metric is {metric!r}; it must be 'cosine' or 'euclidean'")
    result_type = torch.float64 if torch.float64 in (q.dtype, g.dtype) else torch.float32
    # |a - b|^2 from |a|^2 + |b|^2 - 2ab cancels where a and b are near, which is where ranks are
    # decided; in float64 nothing that float32 embeddings hold is lost.
    work_type = torch.float64 if metric == "euclidean" else result_type
    g = g.to(q.device, work_type)
    if metric == "cosine":
        g = F.normalize(g, dim=1)
    squares = g.square().sum(1)
    bytes_per_row = max(1, len(g)) * torch.finfo(work_type).bits // 8
    rows = max(1, block_bytes // bytes_per_row)
    for start in range(0, len(q), rows):
        part = q[start : start + rows].to(work_type)
        if metric == "cosine":
            yield start, (F.normalize(part, dim=1) @ g.T).neg_().add_(1.0)
        else:
            squared = torch.addmm(squares.expand(len(part), -1), part, g.T, alpha=-2.0)
            squared += part.square().sum(1, keepdim=True)
            yield start, squared.clamp_(min=0.0).sqrt_().to(result_type)


def _part_blocks(
    query: Tensor,
    gallery: Tensor,
    metric: Metric,
    visibility: tuple[Array, Array],
    block_bytes: int,
) -> Iterator[tuple[int, Tensor]]:
    seen = as_tensor(visibility[0], "query_visibility").to(query.device)
    gallery_seen = as_tensor(visibility[1], "gallery_visibility").to(query.device)
    gallery = gallery.to(query.device)
    width = torch.promote_types(query.dtype, torch.float32).itemsize
    rows = max(1, block_bytes // max(1, width * len(gallery)))
    for start in range(0, len(query), rows):
        part = slice(start, start + rows)
        yield (
            start,
            gsalign_kernels.part_distance(
                query[part], gallery, seen[part], gallery_seen, metric=metric
            ),
        )
