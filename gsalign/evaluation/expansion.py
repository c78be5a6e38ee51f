"""Query expansion: every embedding moves towards its nearest ones (Radenović et al., 2018)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gsalign.evaluation.distances import BLOCK_BYTES, Array, as_tensor, distance_blocks
from gsalign.evaluation.nearest import nearest


@dataclass(frozen=True)
class Expansion:
    """Settings of the query expansion; the defaults are those re-identification toolkits use.

    Attributes:
        k: how many embeddings are averaged, the expanded one among them.
        alpha: power of the similarity that weighs them.

    Raises:
        ValueError: ``k`` is below 1, or ``alpha`` negative or not finite.
    """

    k: int = 5
    alpha: float = 3.0

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k of the query expansion is {self.k}; it must be at least 1")
        if not (self.alpha >= 0 and math.isfinite(self.alpha)):
            raise ValueError(
                f"alpha of the query expansion is {self.alpha}; wanted a finite number from 0"
            )


def expand_embeddings(
    query: Array,
    gallery: Array,
    settings: Expansion | None = None,
    *,
    block_bytes: int = BLOCK_BYTES,
) -> tuple[Tensor, Tensor]:
    """Replace every embedding by the weighted mean of those nearest to it.

    All images take part, as in the toolkits: an embedding of the query or of the gallery becomes
    the sum of its k most similar ones in both, itself included, each of length 1 and weighted by
    (cosine similarity) ** alpha, negative similarities by 0. The similarity matrix is never held.

    Args:
        query: ``[Q, D]``; need not be normalised.
        gallery: ``[G, D]``.
        settings: the defaults if None.
        block_bytes: the largest block of similarities held.

    Returns:
        Embeddings of length 1, ``[Q, D]`` and ``[G, D]``, on the device of ``query``.

    Raises:
        ValueError: a shape does not fit.
    """
    chosen = Expansion() if settings is None else settings
    q, g = as_tensor(query, "query"), as_tensor(gallery, "gallery")
    if q.dim() != 2 or g.dim() != 2 or q.shape[1] != g.shape[1]:
        raise ValueError(
            f"query {tuple(q.shape)} and gallery {tuple(g.shape)}: query expansion wants [Q, D] "
            "and [G, D], one embedding an image"
        )
    points = F.normalize(torch.cat([q, g.to(q)]), dim=1)
    expanded = torch.empty_like(points)
    for start, block in distance_blocks(points, points, block_bytes=block_bytes):
        distances, places = nearest(block, chosen.k)
        weights = (1.0 - distances).clamp_(min=0.0) ** chosen.alpha
        part = expanded[start : start + len(block)].zero_()
        # One neighbour at a time: all of them at once would be k times the embeddings.
        for weight, place in zip(weights.unbind(1), places.unbind(1), strict=True):
            part.addcmul_(weight[:, None].to(points), points[place])
    expanded = F.normalize(expanded, dim=1)
    return expanded[: len(q)], expanded[len(q) :]
