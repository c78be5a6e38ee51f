"""What makes a host wait for its device, forbidden for the length of a block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

# Their result, or its shape, is a question to the device.
ASKING = {
    aten._local_scalar_dense,
    aten._unique2,
    aten.bincount,
    aten.equal,
    aten.is_nonzero,
    aten.masked_select,
    aten.nonzero,
    aten.repeat_interleave,
    aten.unique_consecutive,
    aten.unique_dim,
}
# By a mask they look for its true places first.
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class HostWaitError(AssertionError):
    """A host that would wait for its device."""


class NoHostWaits(TorchDispatchMode):
    """Raises where an operator on a GPU would make the host wait, on whatever device it runs here.

    Copies from one device to another count too: one that is not of pinned memory waits.
    """

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        given = tree_leaves((arguments, keywords))
        packet = function.overloadpacket
        if packet in ASKING:
            raise HostWaitError(f"{function} asks the device")
        if packet in INDEXING and any(t.dtype in (torch.bool, torch.uint8) for t in indices(given)):
            raise HostWaitError(f"{function} with a mask asks the device for its true places")
        result = function(*arguments, **(keywords or {}))
        devices = {t.device for t in (*given, *tree_leaves(result)) if isinstance(t, Tensor)}
        if len(devices) > 1 and packet in (aten._to_copy, aten.copy_):
            raise HostWaitError(f"{function} copies between {sorted(map(str, devices))}")
        return result


def indices(given: list[Any]) -> list[Tensor]:
    return [value for value in given[1:] if isinstance(value, Tensor)]
