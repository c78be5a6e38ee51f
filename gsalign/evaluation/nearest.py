"""The nearest images of every query, in the order of a ranking."""

from __future__ import annotations

from torch import Tensor


def nearest(distances: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k smallest distances of every row, ascending, equal ones by their place.

    ``torch.topk`` leaves the order of equal values open; two copies of an image would then make
    results depend on the device and its number of threads.

    Args:
        distances: float ``[Q, G]``.
        k: how many; at most G are returned.

    Returns:
        Distances and places (int64), both ``[Q, min(k, G)]``.
    """
    k = min(k, distances.shape[1])
    if k == 0:
        nothing = distances[:, :0]
        return nothing, nothing.long()
    values, places = distances.topk(k, dim=1, largest=False)
    # More values are as near as the last one taken than were taken: topk chose among them.
    crowded = (distances <= values.amax(1, keepdim=True)).sum(1) > k
    if crowded.any():
        rows = crowded.nonzero()[:, 0]
        sorted_values, order = distances[rows].sort(dim=1, stable=True)
        values[rows], places[rows] = sorted_values[:, :k], order[:, :k]
    places, order = places.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, stable=True)
    return values, places.gather(1, order)
