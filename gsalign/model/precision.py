"""Which floating-point type small but delicate parts compute in, whatever autocast says."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(like: Tensor) -> AbstractContextManager[object]:
    """A context in which the device type of ``like`` computes in the types it is given."""
    if like.device.type == "meta":
        # Autocast knows no meta device, and there are no numbers to keep precise.
        return nullcontext()
    return torch.autocast(like.device.type, enabled=False)


def promote(tensor: Tensor) -> Tensor:
    """float16 and bfloat16 as float32; float32 and float64 as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
