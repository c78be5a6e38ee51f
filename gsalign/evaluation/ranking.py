"""Ranks of the positives of every query: three rankers that give the same numbers."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gsalign.errors import ConfigError, DataError
from gsalign.evaluation.metrics import average_precision, inverse_negative_penalty
from gsalign.evaluation.positive_ranks import positive_ranks

Ranker = Literal["auto", "numpy", "cpp", "torch"]
_RANKERS = ("auto", "numpy", "cpp", "torch")


@dataclass(frozen=True)
class Ranking:
    """Per query; see ``EvaluationResult`` for the attributes. All ``[Q]``."""

    num_positives: NDArray[np.int64]
    first_rank: NDArray[np.int64]
    average_precision: NDArray[np.float64]
    inp: NDArray[np.float64]


def _load_compiled() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module("gsalign_kernels._bindings")
    except ImportError as error:
        return None, f"gsalign_kernels._bindings is not built or does not load: {error}"
    if not hasattr(module, "rank"):
        return None, "gsalign_kernels._bindings was built without the ranker"
    return module, ""


_compiled, _why_not = _load_compiled()


def ranking_report() -> dict[str, str]:
    """Say which rankers can serve: name to the empty string, or to the reason why not."""
    return {"cpp": _why_not, "numpy": "", "torch": ""}


def rank(
    distances: NDArray[np.floating] | Tensor,
    query_identities: NDArray[np.int64],
    gallery_identities: NDArray[np.int64],
    query_cameras: NDArray[np.int64],
    gallery_cameras: NDArray[np.int64],
    *,
    ranker: Ranker = "auto",
    threads: int = 0,
) -> Ranking:
    """Rank the gallery for every query and score the ranks of the positives.

    For each query the gallery images of the same identity and camera are left out; the others of
    that identity are its positives. The order is by distance and, for equal distances, by place in
    the gallery. All rankers give the same numbers to the last bit.

    Args:
        distances: float32 or float64 ``[Q, G]``, NumPy array or tensor; other types are converted
            to float64.
        query_identities: ``[Q]``.
        gallery_identities: ``[G]``.
        query_cameras: ``[Q]``.
        gallery_cameras: ``[G]``.
        ranker: ``"cpp"`` (exact, no full sort, linear memory), ``"torch"`` (where the distances
            are, so on a GPU too), ``"numpy"`` (the reference, which sorts), or ``"auto"``: torch
            for a tensor on a GPU; else compiled where it is built, else NumPy; ``ranking_report``
            tells.
        threads: of the compiled ranker; 0 is all.

    Returns:
        The scores of every query.

    Raises:
        ValueError: a shape does not fit.
        DataError: a distance is NaN.
        ConfigError: ``ranker`` is unknown, or ``"cpp"`` and it is not there.
    """
    if ranker not in _RANKERS:
        raise ConfigError(f"ranker is {ranker!r}; it must be one of {', '.join(_RANKERS)}")
    if distances.ndim != 2:
        raise ValueError(f"distances has shape {tuple(distances.shape)}; wanted [Q, G]")
    columns = []
    for name, column, length in (
        ("query_identities", query_identities, distances.shape[0]),
        ("gallery_identities", gallery_identities, distances.shape[1]),
        ("query_cameras", query_cameras, distances.shape[0]),
        ("gallery_cameras", gallery_cameras, distances.shape[1]),
    ):
        column = np.ascontiguousarray(column, dtype=np.int64)
        if column.shape != (length,):
            raise ValueError(
                f"{name} has shape {column.shape}; distances "
                f"{tuple(distances.shape)} want ({length},)"
            )
        columns.append(column)
    if ranker == "torch" or (
        ranker == "auto" and isinstance(distances, Tensor) and distances.is_cuda
    ):
        return _rank_torch(distances, *columns)
    distances = _as_array(distances)
    if ranker == "cpp" and _compiled is None:
        raise ConfigError(f"ranker 'cpp' cannot run: {_why_not}; use 'numpy' or 'auto'")
    if ranker == "numpy" or _compiled is None:
        return _rank_numpy(distances, *columns)
    if distances.strides[1] != distances.itemsize:
        distances = np.ascontiguousarray(distances)
    try:
        scores = _compiled.rank(distances, *columns, threads=threads)
    except ValueError as error:
        if "NaN" not in str(error):
            raise
        raise DataError(_nan_message(str(error))) from None
    return Ranking(**scores)


def _as_array(distances: NDArray[np.floating] | Tensor) -> NDArray[np.floating]:
    if isinstance(distances, Tensor):
        if distances.dtype not in (torch.float32, torch.float64):
            distances = distances.double()
        distances = distances.detach().cpu().numpy()
    if distances.dtype not in (np.float32, np.float64):
        distances = distances.astype(np.float64)
    return distances


def _rank_torch(distances: NDArray[np.floating] | Tensor, *columns: NDArray[np.int64]) -> Ranking:
    if not isinstance(distances, Tensor):
        # A copy, because torch takes neither all strides nor read-only arrays.
        distances = torch.from_numpy(np.array(_as_array(distances)))
    distances = distances.detach()
    if distances.dtype not in (torch.float32, torch.float64):
        distances = distances.double()
    bad = distances.isnan()
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise DataError(_nan_message(f"distances[{row}, {column}] is NaN"))
    ranks, counts = positive_ranks(distances, *columns)
    shares = np.arange(1, ranks.shape[1] + 1) / np.maximum(ranks, 1)
    valid = counts > 0
    last = np.maximum(counts, 1) - 1
    every = np.arange(len(ranks))
    result = Ranking(
        num_positives=counts,
        first_rank=np.zeros(len(ranks), dtype=np.int64),
        average_precision=np.full(len(ranks), np.nan),
        inp=np.full(len(ranks), np.nan),
    )
    if valid.any():
        result.first_rank[valid] = ranks[valid, 0]
        # cumsum adds from left to right, as the other rankers do.
        sums = np.cumsum(shares, axis=1)[every, last]
        result.average_precision[valid] = sums[valid] / counts[valid]
        result.inp[valid] = counts[valid] / ranks[every, last][valid]
    return result


def _nan_message(what: str) -> str:
    return f"{what}; the embeddings it came from are not finite"


def _rank_numpy(
    distances: NDArray[np.floating],
    query_identities: NDArray[np.int64],
    gallery_identities: NDArray[np.int64],
    query_cameras: NDArray[np.int64],
    gallery_cameras: NDArray[np.int64],
) -> Ranking:
    queries = len(distances)
    result = Ranking(
        num_positives=np.zeros(queries, dtype=np.int64),
        first_rank=np.zeros(queries, dtype=np.int64),
        average_precision=np.full(queries, np.nan),
        inp=np.full(queries, np.nan),
    )
    for q in range(queries):
        row = distances[q]
        bad = np.isnan(row)
        if bad.any():
            raise DataError(_nan_message(f"distances[{q}, {int(bad.argmax())}] is NaN"))
        same = gallery_identities == query_identities[q]
        kept = ~(same & (gallery_cameras == query_cameras[q]))
        order = np.argsort(row[kept], kind="stable")
        ranks = np.flatnonzero(same[kept][order]) + 1
        result.num_positives[q] = ranks.size
        if ranks.size:
            result.first_rank[q] = ranks[0]
            result.average_precision[q] = average_precision(ranks)
            result.inp[q] = inverse_negative_penalty(ranks)
    return result
