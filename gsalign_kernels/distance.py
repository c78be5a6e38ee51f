"""Visibility-weighted distances of part embeddings, and exact search by them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gsalign_kernels import backends, checks, registration
from gsalign_kernels.reference import distance as reference
from gsalign_kernels.reference.tps import computation_dtype

METRICS = ("cosine", "euclidean")

TILE_BYTES = 64 * 2**20


def part_distance(
    query: Tensor,
    gallery: Tensor,
    query_visibility: Tensor,
    gallery_visibility: Tensor,
    *,
    metric: str = "cosine",
    unmatched: float = math.inf,
    implementation: str | None = None,
) -> Tensor:
    """How far images are apart by the parts that both show.

    The distance of two images is ``sum_p w_p d_p / sum_p w_p`` with ``w_p = sqrt(v_q,p v_g,p)``:
    for visibilities of 0 and 1 the mean over the parts visible in both. ``d_p`` is 1 - cosine of
    the two part embeddings (an all-zero one has cosine 0), in 0 .. 2, or their Euclidean distance
    as given, not normalised. Where no part is visible in both, the distance is ``unmatched``. A
    part whose weight is 0 counts for nothing, whatever its embedding holds; a part that is visible
    in both and not finite in one makes the distance NaN. Visibilities want to be finite and not
    negative: an image with one that is negative, infinite or NaN has distance NaN to every other.

    Computed in float32, or in float64 when any argument is float64; no tensor of parts x queries x
    gallery is made. There are no gradients: the result never requires any.

    Args:
        query: part embeddings ``[Q, P, D]``.
        gallery: part embeddings ``[G, P, D]``.
        query_visibility: ``[Q, P]``, floating-point or bool.
        gallery_visibility: ``[G, P]``, floating-point or bool.
        metric: ``"cosine"`` or ``"euclidean"``.
        unmatched: the distance of images without a part in common.
        implementation: ``"reference"``, ``"cpp"``, or None for the choice in force.

    Returns:
        ``[Q, G]``, float32 (float64 when any argument is).

    Raises:
        TypeError: an argument has another type.
        ValueError: a shape, device or metric is not as above.
        KernelUnavailableError: the named implementation cannot run.
    """
    query_visibility, gallery_visibility = _checked(
        query, gallery, query_visibility, gallery_visibility, metric
    )
    checks.check_same_device(
        query=query,
        gallery=gallery,
        query_visibility=query_visibility,
        gallery_visibility=gallery_visibility,
    )
    dtype = computation_dtype(query, gallery, query_visibility, gallery_visibility)
    chosen = backends.select("part_distance", query.device, implementation)
    sides = (query, gallery, query_visibility, gallery_visibility)
    with torch.no_grad():
        if chosen == "reference":
            return reference.part_distance(*sides, metric, float(unmatched), dtype, TILE_BYTES)
        op = registration.operator("part_distance", chosen)
        return op(*_in_operator_types(dtype, *sides), METRICS.index(metric), float(unmatched))


def part_search(
    query: Tensor,
    gallery: Tensor,
    query_visibility: Tensor,
    gallery_visibility: Tensor,
    *,
    k: int,
    metric: str = "cosine",
    unmatched: float = math.inf,
    tile_bytes: int = TILE_BYTES,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k nearest gallery images of every query by :func:`part_distance`, exactly.

    The gallery goes by in tiles and is not copied as a whole, so that memory does not grow with
    it: a CPU tensor over a memory-mapped array (``torch.from_numpy``) is read from the file once
    per 512 queries or fewer times. Only a gallery of another width than the computation, float32
    beside a float64 query, is converted first.

    Nearest come first; of equal distances the lower gallery index. Images without a part in common
    come behind all others whatever ``unmatched`` is, and NaN distances last of all. The same bits
    for any number of threads.

    Args:
        query: part embeddings ``[Q, P, D]``.
        gallery: part embeddings ``[G, P, D]``, on the device of ``query`` or on the CPU, from where
            it is brought tile by tile.
        query_visibility: ``[Q, P]``, floating-point or bool.
        gallery_visibility: ``[G, P]``, floating-point or bool, where ``gallery`` is.
        k: how many, 0 to G.
        metric: ``"cosine"`` or ``"euclidean"``.
        unmatched: the distance given to images without a part in common.
        tile_bytes: largest tile of distances ``[Q, columns]`` (one column at least) where an
            implementation stores one: the reference, which keeps a few of that size; cpp has none.
        implementation: ``"reference"``, ``"cpp"``, or None for the choice in force.

    Returns:
        (distances ``[Q, k]``, float32, or float64 when any argument is; indices into the gallery
        ``[Q, k]``, int64). Without gradients.

    Raises:
        TypeError: an argument has another type.
        ValueError: a shape, device or metric is not as above, k is not in 0 .. G, or ``tile_bytes``
            is below 1.
        KernelUnavailableError: the named implementation cannot run.
    """
    query_visibility, gallery_visibility = _checked(
        query, gallery, query_visibility, gallery_visibility, metric
    )
    checks.check_same_device(query=query, query_visibility=query_visibility)
    checks.check_same_device(gallery=gallery, gallery_visibility=gallery_visibility)
    if gallery.device.type != "cpu":
        checks.check_same_device(query=query, gallery=gallery)
    for name, value in (("k", k), ("tile_bytes", tile_bytes)):
        if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
            raise TypeError(f"{name}: wanted an integer, got {value!r}")
    if not 0 <= k <= gallery.shape[0]:
        raise ValueError(f"k: wanted 0 to {gallery.shape[0]} (the size of the gallery), got {k}")
    if tile_bytes < 1:
        raise ValueError(f"tile_bytes: wanted at least 1, got {tile_bytes}")
    dtype = computation_dtype(query, gallery, query_visibility, gallery_visibility)
    chosen = backends.select("part_search", query.device, implementation)
    sides = (query, gallery, query_visibility, gallery_visibility)
    with torch.no_grad():
        if chosen == "reference":
            found = reference.part_search(*sides, k, metric, dtype, tile_bytes)
        else:
            op = registration.operator("part_search", chosen)
            found = op(*_in_operator_types(dtype, *sides), k, METRICS.index(metric))
        distances, indices = found
        if unmatched != math.inf:
            alone = _without_common_part(query_visibility, gallery_visibility, indices, dtype)
            distances = distances.masked_fill(alone, unmatched)
    return distances, indices


def _checked(
    query: Tensor,
    gallery: Tensor,
    query_visibility: Tensor,
    gallery_visibility: Tensor,
    metric: str,
) -> tuple[Tensor, Tensor]:
    """Checks shapes, types and the metric; returns the visibilities, those of bool as float32."""
    checks.check_tensor("query", query, ("Q", "P", "D"))
    checks.check_tensor("gallery", gallery, ("G", query.shape[1], query.shape[2]))
    checks.check_choice("metric", metric, METRICS)

    def visibility(name: str, value: Tensor, images: int) -> Tensor:
        if isinstance(value, Tensor) and value.dtype == torch.bool:
            value = value.float()
        return checks.check_tensor(name, value, (images, query.shape[1]))

    return (
        visibility("query_visibility", query_visibility, query.shape[0]),
        visibility("gallery_visibility", gallery_visibility, gallery.shape[0]),
    )


def _in_operator_types(
    dtype: torch.dtype,
    query: Tensor,
    gallery: Tensor,
    query_visibility: Tensor,
    gallery_visibility: Tensor,
) -> tuple[Tensor, ...]:
    """Everything in the type of the computation, but the gallery where that is its own."""
    if computation_dtype(gallery) != dtype:
        gallery = gallery.to(dtype)
    return query.to(dtype), gallery, query_visibility.to(dtype), gallery_visibility.to(dtype)


def _without_common_part(
    query_visibility: Tensor, gallery_visibility: Tensor, indices: Tensor, dtype: torch.dtype
) -> Tensor:
    """Whether query and gallery image share no part: ``[Q, k]``."""
    query_share = query_visibility.to(dtype).sqrt()
    gallery_share = gallery_visibility.to(indices.device, dtype).sqrt()
    return (query_share.unsqueeze(1) * gallery_share[indices]).sum(dim=2) == 0


def _distance_fake(
    query: Tensor,
    gallery: Tensor,
    query_visibility: Tensor,
    gallery_visibility: Tensor,
    metric: int,
    unmatched: float,
) -> Any:
    return query.new_empty(query.shape[0], gallery.shape[0])


def _search_fake(
    query: Tensor,
    gallery: Tensor,
    query_visibility: Tensor,
    gallery_visibility: Tensor,
    k: int,
    metric: int,
) -> Any:
    shape = (query.shape[0], k)
    return query.new_empty(shape), query.new_empty(shape, dtype=torch.int64)


backends.declare("part_distance", "cpp")
backends.declare("part_search", "cpp")
registration.register_without_gradient("part_distance", fake=_distance_fake)
registration.register_without_gradient("part_search", fake=_search_fake)
