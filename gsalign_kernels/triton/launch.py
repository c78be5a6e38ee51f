"""What every Triton operator asks before and while it launches; triton itself is not imported."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

_MAX_GRID = 2**31 - 1


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU; settled before triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def unavailable(device_type: str) -> str | None:
    """Why these operators cannot run on tensors of this device type; None when they can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if device_type == "cuda":
        return None
    if device_type == "cpu" and interpreted():
        return None
    return (
        f"triton runs on CUDA tensors, these are on {device_type} "
        "(set TRITON_INTERPRET=1 before importing triton to interpret its kernels on the CPU)"
    )


def power_of_two(value: int, least: int, most: int) -> int:
    """The smallest power of two that holds ``value``, between ``least`` and ``most``."""
    return min(most, max(least, 1 << max(value - 1, 0).bit_length()))


def empty_output(like: Tensor) -> Tensor:
    """Room for a kernel's result in the type of ``like``.

    The interpreter cuts float32 to bfloat16 where GPUs round, so there it writes float32 and
    PyTorch rounds.
    """
    dtype = torch.float32 if interpreted() and like.dtype == torch.bfloat16 else like.dtype
    return torch.empty_like(like, dtype=dtype)


def ceil_div(value: int, divisor: int) -> int:
    """``value / divisor``, rounded up."""
    return -(-value // divisor)


def checked_grid(operator: str, programs: int) -> tuple[int]:
    """The grid of a launch.

    Raises:
        ValueError: more programs than one launch can have.
    """
    if programs > _MAX_GRID:
        raise ValueError(f"{operator}: {programs} programs in one launch; split the batch")
    return (programs,)


def device_of(tensor: Tensor) -> Any:
    """Launches go to the current device, so make the tensor's current."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)
