"""Token warp in Triton: the operators ``gsalign_triton::warp_tokens`` and its backward pass."""

from __future__ import annotations

import importlib
import os
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from gsalign_kernels.errors import KernelUnavailableError

MAX_QUERIES = 1 << 24
"""Largest map, in tokens: a cell and its flags share 32 bits. As in the CUDA kernels."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_GRID = 2**31 - 1


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def unavailable(device_type: str) -> str | None:
    """Why these operators cannot run on tensors of this device type; None when they can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if device_type == "cuda":
        return None
    if device_type == "cpu" and _interpreted():
        return None
    return (
        f"triton runs on CUDA tensors, these are on {device_type} "
        "(set TRITON_INTERPRET=1 before importing triton to interpret its kernels on the CPU)"
    )


@lru_cache(maxsize=1)
def _kernels() -> Any:
    return importlib.import_module("gsalign_kernels.triton.warp_kernels")


def _power_of_two(value: int, least: int, most: int) -> int:
    """The smallest power of two that holds ``value``, between ``least`` and ``most``."""
    return min(most, max(least, 1 << max(value - 1, 0).bit_length()))


def _divides_well(channels: int) -> bool:
    """Whether a row's values come in 16-byte accesses.

    Where not, each is read by itself, with an address of its own in registers, so that a thread
    can hold half as many.
    """
    return channels % 16 == 0


def block_sizes(queries: int, channels: int, most_queries: int = 64) -> dict[str, int]:
    """Queries and channels of a program; at most 64 x 64, so few variants are ever compiled."""
    return {
        "BLOCK_Q": _power_of_two(queries, 16, most_queries),
        "BLOCK_C": _power_of_two(channels, 16, 64 if _divides_well(channels) else 32),
    }


def warps_for(block: dict[str, int], channels: int, thread_values: int = 16) -> int:
    """Warps of a program by the values of a tile that each thread gets, at least one warp."""
    values = block["BLOCK_Q"] * block["BLOCK_C"]
    thread_values = thread_values if _divides_well(channels) else thread_values // 2
    return _power_of_two(values // (32 * thread_values), 1, 8)


def _empty_output(like: Tensor) -> Tensor:
    """Room for a kernel's result in the type of ``like``.

    The interpreter cuts float32 to bfloat16 where GPUs round, so there it writes float32 and
    PyTorch rounds.
    """
    dtype = torch.float32 if _interpreted() and like.dtype == torch.bfloat16 else like.dtype
    return torch.empty_like(like, dtype=dtype)


def _ceil(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _checked_grid(programs: int) -> tuple[int]:
    if programs > _MAX_GRID:
        raise ValueError(f"warp_tokens: {programs} programs in one launch; split the batch")
    return (programs,)


def _check(
    tokens: Tensor,
    source_points: Tensor,
    angle: Tensor,
    basis: Tensor,
    height: int,
    width: int,
    prefix: int,
) -> None:
    reason = unavailable(tokens.device.type)
    if reason is not None:
        raise KernelUnavailableError(f"warp_tokens: triton cannot run: {reason}")
    if tokens.dtype not in _DTYPES:
        raise TypeError(
            f"tokens: triton takes float32, float16 and bfloat16, got {tokens.dtype}; "
            'use implementation="reference"'
        )
    queries = height * width
    if height < 1 or width < 1 or queries > MAX_QUERIES:
        raise ValueError(f"size: wanted 1 to {MAX_QUERIES} tokens, got {height} x {width}")
    if tokens.dim() != 3 or prefix < 0 or tokens.shape[1] != prefix + queries:
        raise ValueError(
            f"tokens: wanted [B, {prefix} + {height}*{width}, C], got {tuple(tokens.shape)}"
        )
    wanted = {
        "source_points": (source_points, (source_points.shape[0], 2)),
        "angle": (angle, (tokens.shape[0],)),
        "basis": (basis, (queries, source_points.shape[0])),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor.dtype != torch.float32 or tensor.device != tokens.device:
            raise TypeError(
                f"{name}: wanted float32 on {tokens.device}, got {tensor.dtype} on {tensor.device}"
            )
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: wanted shape {shape}, got {tuple(tensor.shape)}")


def _device_of(tensor: Tensor) -> Any:
    """Launches go to the current device, so make the tensor's current."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)


@torch.library.custom_op(
    "gsalign_triton::warp_tokens",
    mutates_args=(),
    schema="(Tensor tokens, Tensor source_points, Tensor angle, Tensor basis, int height,"
    " int width, float eta, int prefix) -> Tensor",
)
def warp_tokens(
    tokens: Tensor,
    source_points: Tensor,
    angle: Tensor,
    basis: Tensor,
    height: int,
    width: int,
    eta: float,
    prefix: int,
) -> Tensor:
    """Forward pass; arguments as :func:`gsalign_kernels.warp_tokens`, checked again."""
    _check(tokens, source_points, angle, basis, height, width, prefix)
    tokens, source_points, angle, basis = (
        t.contiguous() for t in (tokens, source_points, angle, basis)
    )
    batch, _, channels = tokens.shape
    if batch == 0 or channels == 0:
        return torch.empty_like(tokens)
    output = _empty_output(tokens)
    block = block_sizes(height * width, channels)
    blocks = _ceil(height * width, block["BLOCK_Q"])
    tiles = _ceil(channels, block["BLOCK_C"])
    with _device_of(tokens):
        _kernels().forward_kernel[_checked_grid(batch * blocks * tiles)](
            tokens,
            source_points,
            angle,
            basis,
            output,
            eta,
            height,
            width,
            prefix,
            channels,
            source_points.shape[0],
            blocks,
            tiles,
            **block,
            num_warps=warps_for(block, channels),
        )
    return output.to(tokens.dtype)


@torch.library.custom_op(
    "gsalign_triton::warp_tokens_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor tokens, Tensor source_points, Tensor angle, Tensor basis,"
    " int height, int width, float eta, int prefix) -> (Tensor, Tensor, Tensor)",
)
def warp_tokens_backward(
    grad: Tensor,
    tokens: Tensor,
    source_points: Tensor,
    angle: Tensor,
    basis: Tensor,
    height: int,
    width: int,
    eta: float,
    prefix: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of tokens, source points and angle; the same bits on every run."""
    _check(tokens, source_points, angle, basis, height, width, prefix)
    if grad.shape != tokens.shape or grad.dtype != tokens.dtype or grad.device != tokens.device:
        raise ValueError(
            f"grad: wanted {tuple(tokens.shape)} {tokens.dtype} on {tokens.device}, "
            f"got {tuple(grad.shape)} {grad.dtype} on {grad.device}"
        )
    grad, tokens, source_points, angle, basis = (
        t.contiguous() for t in (grad, tokens, source_points, angle, basis)
    )
    batch, _, channels = tokens.shape
    queries, points = height * width, source_points.shape[0]
    if batch == 0 or channels == 0:
        empty = torch.empty_like(tokens)
        return empty, torch.zeros_like(source_points), torch.zeros_like(angle)
    grad_tokens = _empty_output(tokens)
    block = block_sizes(queries, channels)
    block_q = {"BLOCK_Q": block["BLOCK_Q"]}
    blocks = _ceil(queries, block["BLOCK_Q"])
    # One place more than queries: the bounds of the cells have an end.
    sort_blocks = _ceil(queries + 1, block["BLOCK_Q"])
    tiles = _ceil(channels, block["BLOCK_C"])
    cells = torch.empty((batch, queries), dtype=torch.int32, device=tokens.device)
    readers = torch.empty_like(cells)
    bounds = torch.empty((batch, queries + 1), dtype=torch.int32, device=tokens.device)
    fractions = angle.new_empty((batch, queries, 2))
    reader_fractions = torch.empty_like(fractions)
    grad_positions = angle.new_empty((batch, tiles, queries, 2))
    point_sums = angle.new_empty((batch, 2 * points))
    grad_source_points, grad_angle = torch.empty_like(source_points), torch.empty_like(angle)
    kernels = _kernels()
    with _device_of(tokens):
        kernels.taps_kernel[_checked_grid(batch * blocks)](
            source_points,
            angle,
            basis,
            cells,
            fractions,
            height,
            width,
            points,
            blocks,
            **block_q,
            num_warps=1,
        )
        kernels.sort_kernel[_checked_grid(batch * sort_blocks)](
            cells,
            fractions,
            readers,
            reader_fractions,
            bounds,
            queries,
            sort_blocks,
            **block_q,
            num_warps=8,
        )
        # Six tiles are in flight here: with half as many values per thread, none are spilled.
        block = block_sizes(queries, channels, most_queries=32)
        blocks = _ceil(queries, block["BLOCK_Q"])
        kernels.backward_kernel[_checked_grid(batch * blocks * tiles)](
            grad,
            tokens,
            cells,
            fractions,
            readers,
            reader_fractions,
            bounds,
            grad_tokens,
            grad_positions,
            eta,
            height,
            width,
            prefix,
            channels,
            blocks,
            tiles,
            **block,
            num_warps=warps_for(block, channels, thread_values=8),
        )
        kernels.project_kernel[_checked_grid(batch)](
            source_points,
            angle,
            basis,
            grad_positions,
            point_sums,
            grad_angle,
            eta,
            height,
            width,
            points,
            tiles,
            **block_q,
            BLOCK_K=_power_of_two(points, 4, 32),
            num_warps=4,
        )
        block_n = _power_of_two(2 * points, 4, 16)
        kernels.reduce_kernel[(_ceil(2 * points, block_n),)](
            point_sums,
            grad_source_points,
            batch,
            2 * points,
            BLOCK_B=32,
            BLOCK_N=block_n,
            num_warps=4,
        )
    return grad_tokens.to(tokens.dtype), grad_source_points, grad_angle
