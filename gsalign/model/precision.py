"""Which floating-point type small but delicate parts compute in, whatever autocast says."""

from __future__ import annotations

import torch
from torch import Tensor

from gsalign_kernels.reference.precision import without_autocast

__all__ = ["promote", "without_autocast"]


def promote(tensor: Tensor) -> Tensor:
    """float16 and bfloat16 as float32; float32 and float64 as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
