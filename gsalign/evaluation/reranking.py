"""k-reciprocal re-ranking (Zhong et al., CVPR 2017), sparse and in tiles.

The method describes every image by weights on the images that are its neighbours and have it as
theirs, and compares two images by the overlap of these descriptions (their Jaccard distance). The
usual programs hold several matrices of all images by all images. Here the descriptions are sparse,
distances are made again block by block when they are needed, and what is held grows with the
number of images times their neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gsalign.evaluation.distances import (
    BLOCK_BYTES,
    Array,
    Metric,
    as_tensor,
    distance_blocks,
)
from gsalign.evaluation.nearest import nearest
from gsalign.evaluation.sparse_rows import ONE, SparseRows

# Images whose sets of neighbours are compared at a time; each takes about 5 k1^2 bytes.
_SETS_AT_A_TIME = 2048


@dataclass(frozen=True)
class Reranking:
    """Settings of the re-ranking; the defaults are the paper's.

    Attributes:
        k1: neighbours that are looked at.
        k2: neighbours whose descriptions are averaged ("local query expansion"); 1 averages none.
        weight: share of the plain distance in the result, the paper's lambda.

    Raises:
        ValueError: ``k1`` or ``k2`` is below 1, or ``weight`` not in 0 .. 1.
    """

    k1: int = 20
    k2: int = 6
    weight: float = 0.3

    def __post_init__(self) -> None:
        for name in ("k1", "k2"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of the re-ranking is {getattr(self, name)}; wanted 1 up")
        if not 0.0 <= self.weight <= 1.0:
            raise ValueError(f"weight of the re-ranking is {self.weight}; it must be in 0..1")


def rerank(
    query: Array,
    gallery: Array,
    settings: Reranking | None = None,
    *,
    metric: Metric = "cosine",
    visibility: tuple[Array, Array] | None = None,
) -> Tensor:
    """Return the re-ranked distances as one matrix; see :func:`rerank_blocks`.

    Returns:
        ``[Q, G]``, in 0 .. 1, on the device of ``query``.
    """
    blocks = [
        block
        for _, block in rerank_blocks(
            query, gallery, settings, metric=metric, visibility=visibility
        )
    ]
    return torch.cat(blocks) if blocks else torch.zeros(0, len(gallery))


def rerank_blocks(
    query: Array,
    gallery: Array,
    settings: Reranking | None = None,
    *,
    metric: Metric = "cosine",
    visibility: tuple[Array, Array] | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[tuple[int, Tensor]]:
    """Yield the re-ranked distances of the queries to the gallery in blocks of rows.

    With d the distance (1 - cosine, or the squared Euclidean one) divided by the largest of its
    row, and J the Jaccard distance of the descriptions, the result is (1 - weight) J + weight d.
    Query and gallery together are the images among which neighbours are looked for; equal
    distances rank by place, the query first. Works where the embeddings are, on a GPU too, and
    gives the same numbers for any number of threads.

    Args:
        query: ``[Q, D]``, or ``[Q, P, D]`` with ``visibility``.
        gallery: ``[G, D]``, or ``[G, P, D]``.
        settings: the defaults if None.
        metric: see :func:`gsalign.evaluation.pairwise_distances`.
        visibility: likewise.
        block_bytes: the largest block of distances held.

    Yields:
        (number of the first row, block ``[rows, G]``), float32 (float64 if the embeddings are).

    Raises:
        ValueError: a shape does not fit.
    """
    chosen = Reranking() if settings is None else settings
    q = as_tensor(query, "query")
    g = as_tensor(gallery, "gallery").to(q.device)
    seen = None
    if visibility is not None:
        seen = tuple(as_tensor(v, "visibility").to(q.device) for v in visibility)
    points = torch.cat([q, g.to(torch.promote_types(q.dtype, g.dtype))])
    all_seen = None if seen is None else (torch.cat(seen), torch.cat(seen))

    def distances(of: slice, to: slice, size: int = block_bytes) -> Iterator[tuple[int, Tensor]]:
        parts = None if all_seen is None else (all_seen[0][of], all_seen[1][to])
        for start, block in distance_blocks(
            points[of], points[to], metric, visibility=parts, block_bytes=size
        ):
            yield start, block.square_() if metric == "euclidean" else block

    queries, everything = slice(0, len(q)), slice(0, len(points))
    neighbours, farthest = _neighbours(
        distances(everything, everything), max(chosen.k1 + 1, chosen.k2)
    )
    descriptions = _describe(neighbours, farthest, distances(everything, everything), chosen.k1)
    if chosen.k2 > 1:
        descriptions = descriptions.sum_of(neighbours[:, : chosen.k2])
    whole = ONE * min(chosen.k2, neighbours.shape[1])
    answers = descriptions.rows(len(q), len(points)).transposed()
    # A block has several copies in 64 bits from here on.
    for start, block in distances(queries, slice(len(q), len(points)), block_bytes // 8):
        rows = slice(start, start + len(block))
        # Rounding may take the overlap of equal descriptions above the whole.
        common = descriptions.rows(rows.start, rows.stop).overlap(answers).clamp_(max=whole)
        jaccard = 1.0 - common.double() / (2 * whole - common)
        plain = block.double() / farthest[rows, None]
        mixed = jaccard.mul_(1.0 - chosen.weight).add_(plain, alpha=chosen.weight)
        yield start, mixed.to(block.dtype)


def _neighbours(blocks: Iterator[tuple[int, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of every image, itself among them, and its largest distance."""
    places, largest = [], []
    for _, block in blocks:
        places.append(nearest(block, k)[1])
        largest.append(block.amax(1).double())
    # All images may be the same one.
    return torch.cat(places), torch.cat(largest).clamp_(min=torch.finfo(torch.float64).tiny)


def _describe(
    neighbours: Tensor, farthest: Tensor, blocks: Iterator[tuple[int, Tensor]], k1: int
) -> SparseRows:
    """Weights of every image on its expanded k-reciprocal neighbours; the sum of a row is ONE."""
    half = neighbours[:, : round(k1 / 2) + 1]
    neighbours = neighbours[:, : k1 + 1]
    mutual, half_mutual = _reciprocal(neighbours), _reciprocal(half)
    rows, columns, weights = [], [], []
    for start, block in blocks:
        found = _expanded(start, len(block), neighbours, mutual, half, half_mutual)
        row, slot = (found >= 0).nonzero(as_tuple=True)
        column = found[row, slot]
        weight = torch.exp(-block[row, column].double() / farthest[start + row])
        total = torch.zeros(len(block), dtype=torch.int64, device=block.device)
        # The sum of whole numbers does not depend on the order in which threads add.
        total.index_add_(0, row, (weight * ONE).round_().long())
        rows.append(start + row)
        columns.append(column)
        weights.append((weight * ONE / total[row] * ONE).round_().long())
    return SparseRows.of(torch.cat(rows), torch.cat(columns), torch.cat(weights), len(neighbours))


def _reciprocal(neighbours: Tensor) -> Tensor:
    """Which neighbours of every image have it among theirs, bool as ``neighbours`` ``[N, k]``."""
    parts = []
    images = torch.arange(len(neighbours), device=neighbours.device)
    for mine, image in zip(
        neighbours.split(_SETS_AT_A_TIME), images.split(_SETS_AT_A_TIME), strict=True
    ):
        parts.append((neighbours[mine] == image[:, None, None]).any(2))
    return torch.cat(parts)


def _expanded(
    start: int, count: int, neighbours: Tensor, mutual: Tensor, half: Tensor, half_mutual: Tensor
) -> Tensor:
    """Members of the expanded sets of some images, each once per row, -1 for none.

    The set of an image are its k-reciprocal neighbours and, for each of these, the (k/2)-reciprocal
    neighbours of that one, provided more than two thirds of them are in the set already.
    """
    parts = []
    for first in range(start, start + count, _SETS_AT_A_TIME):
        these = slice(first, min(first + _SETS_AT_A_TIME, start + count))
        own = neighbours[these].masked_fill(~mutual[these], -1)
        candidate = own.clamp(min=0)
        theirs = half[candidate].masked_fill(~half_mutual[candidate], -1)
        theirs.masked_fill_((own < 0)[:, :, None], -1)
        valid = theirs >= 0
        common = torch.zeros_like(valid)
        for member in own.split(1, dim=1):
            common |= theirs == member[:, :, None]
        enough = 3 * (common & valid).sum(2) > 2 * valid.sum(2)
        theirs.masked_fill_(~enough[:, :, None], -1)
        members = torch.cat([own, theirs.flatten(1)], dim=1).sort(dim=1).values
        members[:, 1:].masked_fill_(members[:, 1:] == members[:, :-1].clone(), -1)
        parts.append(members)
    return torch.cat(parts)
