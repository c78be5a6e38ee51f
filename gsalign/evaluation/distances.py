"""Distances between embeddings, whole or in blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Union

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

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


def pairwise_distances(query: Array, gallery: Array, metric: Metric = "cosine") -> Tensor:
    """Return the distances of every query to every gallery embedding.

    Args:
        query: ``[Q, D]``.
        gallery: ``[G, D]``.
        metric: ``"cosine"``, 1 - cosine similarity, in 0 .. 2; or ``"euclidean"``.

    Returns:
        ``[Q, G]`` on the device of ``query``, float32 (float64 if the embeddings are).

    Raises:
        ValueError: a shape does not fit, or the metric is unknown.
    """
    blocks = list(distance_blocks(query, gallery, metric))
    if not blocks:
        return torch.zeros(0, len(gallery))
    return torch.cat([block for _, block in blocks])


def distance_blocks(
    query: Array, gallery: Array, metric: Metric = "cosine", *, block_bytes: int = BLOCK_BYTES
) -> Iterator[tuple[int, Tensor]]:
    """Yield the distance matrix in blocks of rows, so that the whole never exists.

    Args:
        query: ``[Q, D]``.
        gallery: ``[G, D]``.
        metric: as in ``pairwise_distances``.
        block_bytes: the largest block; it has one row at least.

    Yields:
        (number of the first row, block ``[rows, G]``).

    Raises:
        ValueError: a shape does not fit, or the metric is unknown.
    """
    q, g = as_tensor(query, "query"), as_tensor(gallery, "gallery")
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
