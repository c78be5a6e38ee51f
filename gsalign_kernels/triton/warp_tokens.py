"""Token warp in Triton: the operators ``gsalign_triton::warp_tokens`` and its backward pass."""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gsalign_kernels.triton.launch import (
    ceil_div,
    check_available,
    checked_grid,
    device_of,
    empty_output,
    power_of_two,
    sum_parts,
)

MAX_QUERIES = 1 << 24
"""Largest map, in tokens: a cell and its flags share 32 bits. As in the CUDA kernels."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@lru_cache(maxsize=1)
def _kernels() -> Any:
    return importlib.import_module("gsalign_kernels.triton.warp_tokens_kernels")


def _divides_well(channels: int) -> bool:
    """Whether a row's values come in 16-byte accesses.

    Where not, each is read by itself, with an address of its own in registers, so that a thread
    can hold half as many.
    """
    return channels % 16 == 0


def block_sizes(queries: int, channels: int, most_queries: int = 64) -> dict[str, int]:
    """Queries and channels of a program; at most 64 x 64, so few variants are ever compiled."""
    return {
        "BLOCK_Q": power_of_two(queries, 16, most_queries),
        "BLOCK_C": power_of_two(channels, 16, 64 if _divides_well(channels) else 32),
    }


def warps_for(block: dict[str, int], channels: int, thread_values: int = 16) -> int:
    """Warps of a program by the values of a tile that each thread gets, at least one warp."""
    values = block["BLOCK_Q"] * block["BLOCK_C"]
    thread_values = thread_values if _divides_well(channels) else thread_values // 2
    return power_of_two(values // (32 * thread_values), 1, 8)


def _check(
    tokens: Tensor,
    source_points: Tensor,
    angle: Tensor,
    basis: Tensor,
    height: int,
    width: int,
    prefix: int,
) -> None:
    check_available("warp_tokens", tokens)
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
    output = empty_output(tokens)
    block = block_sizes(height * width, channels)
    blocks = ceil_div(height * width, block["BLOCK_Q"])
    tiles = ceil_div(channels, block["BLOCK_C"])
    with device_of(tokens):
        _kernels().forward_kernel[checked_grid("warp_tokens", batch * blocks * tiles)](
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
    grad_tokens = empty_output(tokens)
    block = block_sizes(queries, channels)
    block_q = {"BLOCK_Q": block["BLOCK_Q"]}
    blocks = ceil_div(queries, block["BLOCK_Q"])
    # One place more than queries: the bounds of the cells have an end.
    sort_blocks = ceil_div(queries + 1, block["BLOCK_Q"])
    tiles = ceil_div(channels, block["BLOCK_C"])
    cells = torch.empty((batch, queries), dtype=torch.int32, device=tokens.device)
    readers = torch.empty_like(cells)
    bounds = torch.empty((batch, queries + 1), dtype=torch.int32, device=tokens.device)
    fractions = angle.new_empty((batch, queries, 2))
    reader_fractions = torch.empty_like(fractions)
    grad_positions = angle.new_empty((batch, tiles, queries, 2))
    point_sums = angle.new_empty((batch, 2 * points))
    grad_source_points, grad_angle = torch.empty_like(source_points), torch.empty_like(angle)
    kernels = _kernels()
    with device_of(tokens):
        kernels.taps_kernel[checked_grid("warp_tokens", batch * blocks)](
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
        kernels.sort_kernel[checked_grid("warp_tokens", batch * sort_blocks)](
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
        blocks = ceil_div(queries, block["BLOCK_Q"])
        kernels.backward_kernel[checked_grid("warp_tokens", batch * blocks * tiles)](
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
        kernels.project_kernel[checked_grid("warp_tokens", batch)](
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
            BLOCK_K=power_of_two(points, 4, 32),
            num_warps=4,
        )
        sum_parts(kernels, "warp_tokens", point_sums.unsqueeze(0), grad_source_points)
    return grad_tokens.to(tokens.dtype), grad_source_points, grad_angle
