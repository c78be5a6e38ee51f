"""Ranks of the positives in PyTorch, on the device of the distances and without sorting them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def positive_ranks(
    distances: Tensor,
    query_identities: NDArray[np.int64],
    gallery_identities: NDArray[np.int64],
    query_cameras: NDArray[np.int64],
    gallery_cameras: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find the ranks of the positives of every query.

    A rank is one more than the number of images ahead: nearer, or as near and before it in the
    gallery. So each rank costs one pass over the row, and nothing is sorted but the positives.

    Args:
        distances: float ``[Q, G]`` without NaN.
        query_identities: ``[Q]``.
        gallery_identities: ``[G]``.
        query_cameras: ``[Q]``.
        gallery_cameras: ``[G]``.

    Returns:
        Ranks from 1, ascending, ``[Q, P]`` with P the largest number of positives, 0 where a query
        has fewer; and the number of positives ``[Q]``.
    """
    device = distances.device

    def there(column: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(column).to(device)

    same = there(query_identities)[:, None] == there(gallery_identities)
    left_out = same & (there(query_cameras)[:, None] == there(gallery_cameras))
    # NaN is neither below nor equal to anything, so an image left out is ahead of none.
    kept = distances.masked_fill(left_out, torch.nan)
    rows, places = (same & ~left_out).nonzero(as_tuple=True)
    near = distances[rows, places]
    # By row, then distance, then place, which nonzero has put in order already.
    order = near.argsort(stable=True)
    order = order[rows[order].argsort(stable=True)]
    rows, places, near = rows[order], places[order], near[order]
    counts = torch.bincount(rows, minlength=len(distances))
    slots = torch.arange(len(rows), device=device) - (counts.cumsum(0) - counts)[rows]
    most = int(counts.max()) if len(counts) else 0
    ranks = torch.zeros(len(distances), most, dtype=torch.int64, device=device)
    column = torch.arange(distances.shape[1], device=device)
    for slot in range(most):
        now = slots == slot
        row, place, limit = rows[now], places[now, None], near[now, None]
        part = kept if len(row) == len(kept) else kept[row]
        ahead = (part < limit).sum(1) + ((part == limit) & (column < place)).sum(1)
        ranks[row, slot] = ahead + 1
    return ranks.cpu().numpy(), counts.cpu().numpy()
