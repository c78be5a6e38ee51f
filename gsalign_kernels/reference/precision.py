"""In which types the reference computes, whatever autocast says."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(like: Tensor) -> AbstractContextManager[object]:
    """A context in which products on the device of ``like`` are computed in the types given.

    The specification says float32 or float64; under autocast a matrix product would be bfloat16.
    """
    if like.device.type == "meta":
        # Autocast knows no meta device, and there are no figures to keep precise.
        return nullcontext()
    return torch.autocast(like.device.type, enabled=False)
