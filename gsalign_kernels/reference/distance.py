"""Distances of part embeddings weighed by visibility, and the nearest by them, in plain PyTorch.

The gallery goes by in tiles: beside the result there is one tile of distances and few like it,
never a tensor of parts x queries x gallery.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gsalign_kernels.reference.precision import without_autocast
from gsalign_kernels.reference.tps import solve_dtype

# The bits of float32's NaN: behind infinity's in the order of integers.
NAN_BITS = 0x7FC00000


def unit_parts(parts: Tensor) -> Tensor:
    """Vectors ``[..., D]`` at length 1; zeros stay, what is not finite gives NaN.

    Divided by the largest magnitude first: the square of a float32 below 1e-23 is 0.
    """
    if parts.shape[-1] == 0:
        return parts
    largest = parts.abs().amax(dim=-1, keepdim=True)
    scaled = parts / torch.where(largest > 0, largest, 1.0)
    length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return scaled / torch.where(length > 0, length, 1.0)


def cosine_tile(
    query: Tensor, gallery: Tensor, query_share: Tensor, gallery_share: Tensor
) -> tuple[Tensor, Tensor]:
    """``sum_p w_p (1 - cosine)`` and ``sum_p w_p``, each ``[Q, G]`` a matrix product.

    ``w_p`` is a product of one share per side, so with the shares multiplied into the unit vectors
    the parts are only a part of the inner dimension. What is not finite is left out of the products
    and put back by a third one: ``0 * NaN`` would spoil pairs that do not have the part in common.
    """

    def prepared(parts: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen = share != 0
        unit = unit_parts(parts)
        broken = seen & ~unit.isfinite().all(dim=-1)
        unit = unit.masked_fill((broken | ~seen).unsqueeze(-1), 0.0)
        return (share.unsqueeze(-1) * unit).flatten(1), seen.to(share), broken.to(share)

    query_unit, query_seen, query_broken = prepared(query, query_share)
    gallery_unit, gallery_seen, gallery_broken = prepared(gallery, gallery_share)
    weight = query_share @ gallery_share.T
    total = torch.addmm(weight, query_unit, gallery_unit.T, alpha=-1.0).clamp_(min=0.0)
    spoiled = (
        torch.cat([query_broken, query_seen], dim=1)
        @ torch.cat([gallery_seen, gallery_broken], dim=1).T
    )
    return total.masked_fill_(spoiled > 0, torch.nan), weight


def euclidean_tile(
    query: Tensor, gallery: Tensor, query_share: Tensor, gallery_share: Tensor
) -> tuple[Tensor, Tensor]:
    """``sum_p w_p |q_p - g_p|`` and ``sum_p w_p``, part by part into one tile.

    ``|q|^2 + |g|^2 - 2 q g`` cancels where two vectors are near, which is where ranks are decided;
    from float32 embeddings float64 products lose nothing that their difference would keep.
    """
    wide = solve_dtype(query.device)
    total = query_share.new_zeros(query.shape[0], gallery.shape[0])
    weight = torch.zeros_like(total)
    for part in range(query.shape[1]):
        q, g = (
            side[:, part].to(wide).masked_fill(~side[:, part].isfinite(), torch.nan)
            for side in (query, gallery)
        )
        squared = torch.addmm(g.square().sum(dim=1).expand(len(q), -1), q, g.T, alpha=-2.0)
        squared += q.square().sum(dim=1, keepdim=True)
        distance = squared.clamp_(min=0.0).sqrt_().to(total.dtype)
        share = torch.outer(query_share[:, part], gallery_share[:, part])
        total += distance.mul_(share).masked_fill_(share == 0, 0.0)
        weight += share
    return total, weight


def distance_tiles(
    query: Tensor,
    gallery: Tensor,
    query_visibility: Tensor,
    gallery_visibility: Tensor,
    metric: str,
    unmatched: float,
    dtype: torch.dtype,
    tile_bytes: int,
) -> Iterator[tuple[int, Tensor]]:
    """The distances in tiles of columns: (number of the first, ``[Q, columns]``).

    The gallery may lie on another device than the queries: a tile of it is brought at a time.
    """
    query = query.to(dtype)
    query_share = query_visibility.to(dtype).sqrt()
    tile_of = cosine_tile if metric == "cosine" else euclidean_tile
    columns = max(1, tile_bytes // max(1, query.shape[0] * dtype.itemsize))
    for start in range(0, gallery.shape[0], columns):
        part = gallery[start : start + columns].to(query.device).to(dtype)
        share = gallery_visibility[start : start + columns].to(query.device, dtype).sqrt()
        with without_autocast(query):
            total, weight = tile_of(query, part, query_share, share)
        yield start, total.div_(weight).masked_fill_(weight == 0, unmatched)


def part_distance(
    query: Tensor,
    gallery: Tensor,
    query_visibility: Tensor,
    gallery_visibility: Tensor,
    metric: str,
    unmatched: float,
    dtype: torch.dtype,
    tile_bytes: int,
) -> Tensor:
    """Distances ``[Q, G]`` of the type given."""
    result = query.new_empty(query.shape[0], gallery.shape[0], dtype=dtype)
    for start, tile in distance_tiles(
        query, gallery, query_visibility, gallery_visibility, metric, unmatched, dtype, tile_bytes
    ):
        result[:, start : start + tile.shape[1]] = tile
    return result


def nearest(distances: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest of each row, ascending, of equal ones the first; NaN behind infinity.

    ``topk`` promises no order of equal values. float32 distances, none of which is negative, are
    ordered as their bits are, and with the column behind the bits no two are equal.
    """
    if distances.dtype != torch.float32:
        ordered, columns = distances.sort(dim=1, stable=True)
        return ordered[:, :k], columns[:, :k]
    bits = (distances + 0.0).view(torch.int32).bitwise_and(0x7FFFFFFF).clamp_(max=NAN_BITS)
    columns = torch.arange(distances.shape[1], device=distances.device)
    keys = bits.to(torch.int64).bitwise_left_shift_(32).bitwise_or_(columns)
    keys = keys.topk(k, dim=1, largest=False, sorted=True).values
    columns = keys & 0xFFFFFFFF
    return distances.gather(1, columns), columns


def part_search(
    query: Tensor,
    gallery: Tensor,
    query_visibility: Tensor,
    gallery_visibility: Tensor,
    k: int,
    metric: str,
    dtype: torch.dtype,
    tile_bytes: int,
) -> tuple[Tensor, Tensor]:
    """The k nearest ``[Q, k]`` and where they are; what has nothing in common is infinitely far."""
    best = query.new_empty(query.shape[0], 0, dtype=dtype)
    where = query.new_empty(query.shape[0], 0, dtype=torch.int64)
    for start, tile in distance_tiles(
        query, gallery, query_visibility, gallery_visibility, metric, torch.inf, dtype, tile_bytes
    ):
        # What was found before stands first, and so goes first where distances are equal.
        tile, columns = nearest(tile, min(k, tile.shape[1]))
        both = torch.cat([best, tile], dim=1)
        best, chosen = nearest(both, min(k, both.shape[1]))
        where = torch.cat([where, columns + start], dim=1).gather(1, chosen)
    return best, where
