"""What every Triton operator asks before and while it launches; triton itself is not imported."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from gsalign_kernels.errors import KernelUnavailableError

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


def check_available(operator: str, tensor: Tensor) -> None:
    """Raises :class:`KernelUnavailableError` when Triton cannot run on this tensor's device."""
    reason = unavailable(tensor.device.type)
    if reason is not None:
        raise KernelUnavailableError(f"{operator}: triton cannot run: {reason}")


def check_like(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Require shape, and the type and device of ``like``."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: wanted shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise TypeError(
            f"{name}: wanted {like.dtype} on {like.device}, got {tensor.dtype} on {tensor.device}"
        )


def power_of_two(value: int, least: int, most: int) -> int:
    """The smallest power of two that holds ``value``, between ``least`` and ``most``."""
    return min(most, max(least, 1 << max(value - 1, 0).bit_length()))


def empty_output(like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Room for a kernel's result in the type of ``like``, contiguous; its shape too by default.

    The interpreter cuts float32 to bfloat16 where GPUs round, so there it writes float32 and
    PyTorch rounds.
    """
    dtype = torch.float32 if interpreted() and like.dtype == torch.bfloat16 else like.dtype
    return like.new_empty(like.shape if shape is None else shape, dtype=dtype)


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


def sum_parts(kernels: Any, operator: str, parts: Tensor, output: Tensor) -> None:
    """Sum what the programs of an earlier launch left, in a fixed order.

    Args:
        kernels: a module of kernels that has ``reduce_kernel``.
        operator: for the message when there are too many programs.
        parts: ``[samples, parts, columns]``.
        output: ``samples * columns`` values, contiguous, of the same type.
    """
    samples, count, columns = parts.shape
    block = power_of_two(columns, 4, 16)
    column_blocks = ceil_div(columns, block)
    kernels.reduce_kernel[checked_grid(operator, samples * column_blocks)](
        parts,
        output,
        count,
        columns,
        column_blocks,
        BLOCK_R=32,
        BLOCK_N=block,
        num_warps=4,
    )
