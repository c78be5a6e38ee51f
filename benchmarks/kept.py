"""How many bytes a forward pass keeps for its backward pass, counted on any device."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def kept_mib(
    forward: Callable[[], object],
    known: Iterable[Tensor],
    beside: Callable[[], Iterable[Tensor]] = tuple,
) -> float:
    """MiB that are held when ``forward`` returns: what autograd saved, each storage once.

    Args:
        forward: makes a loss.
        known: tensors that are there anyway, as parameters and inputs.
        beside: tensors that the forward pass kept for itself, asked for when it is done.
    """
    there = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        result = forward()
    for tensor in beside():
        count(tensor)
    del result
    return sum(kept.values()) / 2**20
