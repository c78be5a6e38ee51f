"""The public entrance: from distances or embeddings to the result of a protocol."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from gsalign.errors import DataError
from gsalign.evaluation.distances import BLOCK_BYTES, Array, Metric, as_tensor, distance_blocks
from gsalign.evaluation.metrics import MAX_RANK, EvaluationResult
from gsalign.evaluation.protocols import PROTOCOLS, Membership, Protocol, get_protocol
from gsalign.evaluation.ranking import Ranker, Ranking, rank


def evaluate(
    distances: Array | None = None,
    *,
    query: Array | None = None,
    gallery: Array | None = None,
    query_identities: ArrayLike,
    gallery_identities: ArrayLike,
    query_cameras: ArrayLike,
    gallery_cameras: ArrayLike,
    query_views: ArrayLike | None = None,
    gallery_views: ArrayLike | None = None,
    query_visibility: Array | None = None,
    gallery_visibility: Array | None = None,
    protocol: str | Protocol = "all",
    metric: Metric = "cosine",
    ranker: Ranker = "auto",
    max_rank: int = MAX_RANK,
    block_bytes: int = BLOCK_BYTES,
) -> EvaluationResult:
    """Evaluate a retrieval by CMC, AP and INP.

    For each query the gallery images of the same identity and camera are left out, and the others
    of that identity are its positives. Queries without positives are skipped and counted
    (``num_queries`` against ``num_valid_queries``). Equal distances rank in gallery order.

    Give either ``distances``, or ``query`` and ``gallery``. From embeddings the distances are made
    block by block and never held as a whole. Neither needs labels beyond the arrays given here.

    Args:
        distances: ``[Q, G]``, smaller is nearer; NumPy array or tensor on any device.
        query: query embeddings ``[Q, D]``; need not be normalised. With visibilities those of the
            parts, ``[Q, P, D]``.
        gallery: gallery embeddings ``[G, D]``, or ``[G, P, D]``.
        query_identities: integers ``[Q]``.
        gallery_identities: integers ``[G]``.
        query_cameras: integers ``[Q]``.
        gallery_cameras: integers ``[G]``.
        query_views: 0 ground, 1 aerial, ``[Q]``; for protocols other than ``"all"``.
        gallery_views: the same for the gallery, ``[G]``.
        query_visibility: of the parts, ``[Q, P]``; distances are then visibility-weighted, see
            :func:`gsalign_kernels.part_distance`.
        gallery_visibility: the same for the gallery, ``[G, P]``.
        protocol: one of ``PROTOCOLS``, or a ``Protocol`` of your own.
        metric: of the embeddings: ``"cosine"`` or ``"euclidean"``.
        ranker: ``"auto"``, ``"cpp"``, ``"torch"`` or ``"numpy"``; the results are the same.
        max_rank: length of the CMC curve.
        block_bytes: the largest block of distances held beside ``distances``.

    Returns:
        Figures per query and over all queries. With no valid query these are NaN.

    Raises:
        ValueError: an argument is missing or of another shape; the message says which.
        ConfigError: the protocol or the ranker is unknown.
        DataError: a distance is NaN.
    """
    return evaluate_protocols(
        distances,
        query=query,
        gallery=gallery,
        query_identities=query_identities,
        gallery_identities=gallery_identities,
        query_cameras=query_cameras,
        gallery_cameras=gallery_cameras,
        query_views=query_views,
        gallery_views=gallery_views,
        query_visibility=query_visibility,
        gallery_visibility=gallery_visibility,
        protocols=[protocol],
        metric=metric,
        ranker=ranker,
        max_rank=max_rank,
        block_bytes=block_bytes,
    )[get_protocol(protocol).name]


def evaluate_protocols(
    distances: Array | None = None,
    *,
    query: Array | None = None,
    gallery: Array | None = None,
    query_identities: ArrayLike,
    gallery_identities: ArrayLike,
    query_cameras: ArrayLike,
    gallery_cameras: ArrayLike,
    query_views: ArrayLike | None = None,
    gallery_views: ArrayLike | None = None,
    query_visibility: Array | None = None,
    gallery_visibility: Array | None = None,
    protocols: Iterable[str | Protocol] = tuple(PROTOCOLS),
    lists: Mapping[str, Membership] | None = None,
    metric: Metric = "cosine",
    ranker: Ranker = "auto",
    max_rank: int = MAX_RANK,
    block_bytes: int = BLOCK_BYTES,
) -> dict[str, EvaluationResult]:
    """Evaluate several protocols on the same distances, computing these once.

    Args and errors are those of ``evaluate``; and ``lists`` has, by name, which queries ``[Q]``
    and gallery images ``[G]`` are on the list of a protocol that has one.

    Returns:
        Protocol name to result, in the order asked.
    """
    if max_rank < 1:
        raise ValueError(f"max_rank is {max_rank}; it must be at least 1")
    chosen = [get_protocol(protocol) for protocol in protocols]
    if (query_visibility is None) != (gallery_visibility is None):
        raise ValueError("give query_visibility and gallery_visibility, or neither")
    visibility = None
    if query_visibility is not None and gallery_visibility is not None:
        visibility = (query_visibility, gallery_visibility)
    blocks, num_queries, num_gallery = _blocks(
        distances, query, gallery, metric, visibility, block_bytes
    )
    identities = (
        _column("query_identities", query_identities, num_queries),
        _column("gallery_identities", gallery_identities, num_gallery),
    )
    cameras = (
        _column("query_cameras", query_cameras, num_queries),
        _column("gallery_cameras", gallery_cameras, num_gallery),
    )
    views = _views(chosen, query_views, gallery_views, num_queries, num_gallery)
    selections = {
        protocol.name: protocol.select(*views, (lists or {}).get(protocol.name))
        for protocol in chosen
    }
    parts: dict[str, list[Ranking]] = {protocol.name: [] for protocol in chosen}
    for start, block in blocks:
        stop = start + len(block)
        for protocol in chosen:
            rows, columns = selections[protocol.name]
            rows = rows[(rows >= start) & (rows < stop)]
            cam = views if protocol.camera_is_view else cameras
            try:
                ranking = rank(
                    _take(block, rows - start, columns),
                    identities[0][rows],
                    identities[1][columns],
                    cam[0][rows],
                    cam[1][columns],
                    ranker=ranker,
                )
            except DataError:
                # The ranker saw a part of the matrix; say where the NaN is in the whole.
                row, column = block.isnan().nonzero()[0].tolist()
                raise DataError(
                    f"the distance of query {start + row} to gallery image {column} is NaN; "
                    "the embeddings it came from are not finite"
                ) from None
            parts[protocol.name].append(ranking)
    return {
        name: join_rankings(name, rankings, *selections[name], max_rank)
        for name, rankings in parts.items()
    }


def _blocks(
    distances: Array | None,
    query: Array | None,
    gallery: Array | None,
    metric: Metric,
    visibility: tuple[Array, Array] | None,
    block_bytes: int,
) -> tuple[Iterator[tuple[int, Tensor]], int, int]:
    """Return an iterator over blocks of rows, and the shape of the whole."""
    if distances is not None:
        if query is not None or gallery is not None or visibility is not None:
            raise ValueError("give either distances, or query and gallery, not both")
        matrix = as_tensor(distances, "distances")
        if matrix.dim() != 2:
            raise ValueError(f"distances has shape {tuple(matrix.shape)}; wanted [Q, G]")
        rows = max(1, block_bytes // max(1, matrix.shape[1] * matrix.element_size()))
        whole = ((start, matrix[start : start + rows]) for start in range(0, len(matrix), rows))
        return whole, *matrix.shape
    if query is None or gallery is None:
        raise ValueError("give distances, or both query and gallery")
    made = distance_blocks(query, gallery, metric, visibility=visibility, block_bytes=block_bytes)
    return made, len(query), len(gallery)


def _take(block: Tensor, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Tensor:
    # Rows are taken as they lie where possible; most protocols keep them all.
    if len(rows) != len(block):
        block = block[torch.from_numpy(rows).to(block.device)]
    if len(columns) == block.shape[1]:
        return block
    return block[:, torch.from_numpy(columns).to(block.device)]


def _column(name: str, values: ArrayLike, length: int) -> NDArray[np.int64]:
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    if array.shape != (length,):
        raise ValueError(f"{name} has shape {array.shape}; wanted ({length},)")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} is {array.dtype}; wanted integers")
    return array.astype(np.int64)


def _views(
    chosen: list[Protocol],
    query_views: ArrayLike | None,
    gallery_views: ArrayLike | None,
    num_queries: int,
    num_gallery: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    if query_views is None or gallery_views is None:
        needing = [protocol.name for protocol in chosen if protocol.needs_views]
        if needing:
            raise ValueError(f"protocol {needing[0]!r} needs query_views and gallery_views")
        return np.zeros(num_queries, np.int64), np.zeros(num_gallery, np.int64)
    return (
        _column("query_views", query_views, num_queries),
        _column("gallery_views", gallery_views, num_gallery),
    )


def join_rankings(
    name: str,
    parts: list[Ranking],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    max_rank: int,
) -> EvaluationResult:
    """Put the rankings of blocks of queries together to the result of a protocol.

    Args:
        name: of the protocol.
        parts: rankings of consecutive blocks.
        rows: place of every query in the whole query.
        columns: places of the gallery images in the whole gallery.
        max_rank: length of the CMC curve.
    """

    def joined(field: str, dtype: type) -> NDArray:
        return np.concatenate([np.empty(0, dtype), *(getattr(part, field) for part in parts)])

    return EvaluationResult(
        protocol=name,
        query_indices=rows,
        num_positives=joined("num_positives", np.int64),
        first_rank=joined("first_rank", np.int64),
        average_precision=joined("average_precision", np.float64),
        inp=joined("inp", np.float64),
        num_gallery=len(columns),
        max_rank=max_rank,
    )
