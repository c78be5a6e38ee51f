"""Ranks of the positives of every query: a NumPy reference, and the compiled ranker."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gsalign.errors import ConfigError, DataError
from gsalign.evaluation.metrics import average_precision, inverse_negative_penalty

Ranker = Literal["auto", "numpy", "cpp"]


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
    return {"cpp": _why_not, "numpy": ""}


def rank(
    distances: NDArray[np.floating],
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
    the gallery. Both rankers give the same numbers to the last bit.

    Args:
        distances: float32 or float64 ``[Q, G]``; other types are converted to float64.
        query_identities: ``[Q]``.
        gallery_identities: ``[G]``.
        query_cameras: ``[Q]``.
        gallery_cameras: ``[G]``.
        ranker: ``"cpp"`` (exact, no full sort, linear memory), ``"numpy"`` (the reference), or
            ``"auto"``: compiled where it is built, else NumPy; ``ranking_report`` tells.
        threads: of the compiled ranker; 0 is all.

    Returns:
        The scores of every query.

    Raises:
        ValueError: a shape does not fit.
        DataError: a distance is NaN.
        ConfigError: ``ranker`` is unknown, or ``"cpp"`` and it is not there.
    """
    if distances.dtype not in (np.float32, np.float64):
        distances = distances.astype(np.float64)
    if distances.ndim != 2:
        raise ValueError(f"distances has shape {distances.shape}; wanted [Q, G]")
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
                f"{name} has shape {column.shape}; distances {distances.shape} want ({length},)"
            )
        columns.append(column)
    if ranker not in ("auto", "numpy", "cpp"):
        raise ConfigError(f"ranker is {ranker!r}; it must be 'auto', 'numpy' or 'cpp'")
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
