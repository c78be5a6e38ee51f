"""Thin-plate splines in Triton: ``gsalign_triton::tps_evaluate``, ``tps_grid``, their backward."""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gsalign_kernels.triton.launch import (
    ceil_div,
    check_available,
    check_like,
    checked_grid,
    device_of,
    power_of_two,
    sum_parts,
)

MAX_POINTS = 1 << 30
"""Most points of evaluation per sample: their number and that of a block more have 32 bits."""

POINTS_PER_PROGRAM = 1024
"""Points whose gradients one program of the backward pass adds up."""

_DTYPES = (torch.float32, torch.float64)


@lru_cache(maxsize=1)
def _kernels() -> Any:
    return importlib.import_module("gsalign_kernels.triton.tps_kernels")


def _check(operator: str, coefficients: Tensor, control_points: Tensor, count: int) -> None:
    check_available(operator, coefficients)
    if coefficients.dtype not in _DTYPES:
        raise TypeError(f"coefficients: wanted float32 or float64, got {coefficients.dtype}")
    if coefficients.dim() != 3 or control_points.dim() != 3:
        raise ValueError(
            "wanted coefficients [B, K+3, V] and control_points [B, K, 2], "
            f"got {tuple(coefficients.shape)} and {tuple(control_points.shape)}"
        )
    batch, points, _ = control_points.shape
    check_like("control_points", control_points, (batch, points, 2), coefficients)
    columns = coefficients.shape[2]
    check_like("coefficients", coefficients, (batch, points + 3, columns), coefficients)
    if count > MAX_POINTS:
        raise ValueError(f"{operator}: wanted at most {MAX_POINTS} points, got {count}")


def _check_map(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise ValueError(f"size: wanted positive lengths, got {height} x {width}")


def _evaluate(
    operator: str,
    coefficients: Tensor,
    control_points: Tensor,
    positions: Tensor | None,
    size: tuple[int, int],
    align_corners: bool,
) -> Tensor:
    """``[B, N, V]`` at positions ``[B, N, 2]``, or at the pixels of a map when there are none."""
    coefficients, control_points = coefficients.contiguous(), control_points.contiguous()
    batch, points, _ = control_points.shape
    count = size[0] * size[1] if positions is None else positions.shape[1]
    columns = coefficients.shape[2]
    output = coefficients.new_empty((batch, count, columns))
    if output.numel() == 0:
        return output
    block = power_of_two(count, 32, 128)
    blocks, pairs = ceil_div(count, block), ceil_div(columns, 2)
    with device_of(coefficients):
        _kernels().evaluate_kernel[checked_grid(operator, batch * blocks * pairs)](
            coefficients,
            control_points,
            control_points if positions is None else positions.contiguous(),
            output,
            count,
            *size,
            points,
            columns,
            blocks,
            pairs,
            MAP=positions is None,
            ALIGN=align_corners,
            BLOCK_P=block,
            num_warps=block // 32,
        )
    return output


def evaluate_backward(
    operator: str,
    grad: Tensor,
    coefficients: Tensor,
    control_points: Tensor,
    positions: Tensor | None,
    size: tuple[int, int],
    align_corners: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of coefficients and control points, for ``grad [B, N, V]``."""
    grad, coefficients, control_points = (
        t.contiguous() for t in (grad, coefficients, control_points)
    )
    batch, points, _ = control_points.shape
    count, columns = grad.shape[1:]
    grad_coefficients = torch.empty_like(coefficients)
    grad_control_points = torch.empty_like(control_points)
    if grad.numel() == 0:
        return grad_coefficients.zero_(), grad_control_points.zero_()
    pairs = ceil_div(columns, 2)
    chunks = ceil_div(count, POINTS_PER_PROGRAM)
    block_k = power_of_two(points + 3, 8, 16)
    tiles = ceil_div(points + 3, block_k)
    coefficient_parts, point_parts = grad_coefficients, grad_control_points
    if chunks > 1:
        coefficient_parts = grad.new_empty((batch, chunks, (points + 3) * columns))
    if chunks * pairs > 1:
        point_parts = grad.new_empty((batch, chunks * pairs, points * 2))
    kernels = _kernels()
    with device_of(grad):
        programs = checked_grid(operator, batch * chunks * tiles * pairs)
        kernels.coefficients_backward_kernel[programs](
            grad,
            coefficients,
            control_points,
            control_points if positions is None else positions.contiguous(),
            coefficient_parts,
            point_parts,
            count,
            *size,
            points,
            columns,
            chunks,
            tiles,
            pairs,
            MAP=positions is None,
            ALIGN=align_corners,
            CHUNK=POINTS_PER_PROGRAM,
            BLOCK_P=32,
            BLOCK_K=block_k,
            num_warps=4,
        )
        if coefficient_parts is not grad_coefficients:
            sum_parts(kernels, operator, coefficient_parts, grad_coefficients)
        if point_parts is not grad_control_points:
            sum_parts(kernels, operator, point_parts, grad_control_points)
    return grad_coefficients, grad_control_points


@torch.library.custom_op(
    "gsalign_triton::tps_evaluate",
    mutates_args=(),
    schema="(Tensor coefficients, Tensor control_points, Tensor points) -> Tensor",
)
def tps_evaluate(coefficients: Tensor, control_points: Tensor, points: Tensor) -> Tensor:
    """Forward pass; arguments as :func:`gsalign_kernels.tps_evaluate`, checked again."""
    _check_points(coefficients, control_points, points)
    return _evaluate("tps_evaluate", coefficients, control_points, points, (1, 1), True)


def _check_points(coefficients: Tensor, control_points: Tensor, points: Tensor) -> None:
    count = points.shape[1] if points.dim() == 3 else 0
    _check("tps_evaluate", coefficients, control_points, count)
    check_like("points", points, (coefficients.shape[0], count, 2), coefficients)


@torch.library.custom_op(
    "gsalign_triton::tps_evaluate_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor coefficients, Tensor control_points, Tensor points)"
    " -> (Tensor, Tensor, Tensor)",
)
def tps_evaluate_backward(
    grad: Tensor, coefficients: Tensor, control_points: Tensor, points: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of coefficients, control points and points; the same bits on every run."""
    _check_points(coefficients, control_points, points)
    batch, count, _ = points.shape
    columns = coefficients.shape[2]
    check_like("grad", grad, (batch, count, columns), coefficients)
    grad, coefficients, control_points, points = (
        t.contiguous() for t in (grad, coefficients, control_points, points)
    )
    grad_coefficients, grad_control_points = evaluate_backward(
        "tps_evaluate", grad, coefficients, control_points, points, (1, 1), True
    )
    grad_points = torch.empty_like(points)
    if grad.numel() == 0:
        return grad_coefficients, grad_control_points, grad_points.zero_()
    block = power_of_two(count, 32, 128)
    blocks = ceil_div(count, block)
    with device_of(grad):
        _kernels().points_backward_kernel[checked_grid("tps_evaluate", batch * blocks)](
            grad,
            coefficients,
            control_points,
            points,
            grad_points,
            count,
            control_points.shape[1],
            columns,
            blocks,
            ceil_div(columns, 2),
            BLOCK_P=block,
            num_warps=block // 32,
        )
    return grad_coefficients, grad_control_points, grad_points


@torch.library.custom_op(
    "gsalign_triton::tps_grid",
    mutates_args=(),
    schema="(Tensor coefficients, Tensor control_points, int height, int width,"
    " bool align_corners) -> Tensor",
)
def tps_grid(
    coefficients: Tensor, control_points: Tensor, height: int, width: int, align_corners: bool
) -> Tensor:
    """Forward pass; arguments as :func:`gsalign_kernels.tps_grid`, checked again."""
    _check_map(height, width)
    _check("tps_grid", coefficients, control_points, height * width)
    size = (height, width)
    dense = _evaluate("tps_grid", coefficients, control_points, None, size, align_corners)
    return dense.view(dense.shape[0], height, width, dense.shape[2])


@torch.library.custom_op(
    "gsalign_triton::tps_grid_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor coefficients, Tensor control_points, bool align_corners)"
    " -> (Tensor, Tensor)",
)
def tps_grid_backward(
    grad: Tensor, coefficients: Tensor, control_points: Tensor, align_corners: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of coefficients and control points; the same bits on every run."""
    if grad.dim() != 4:
        raise ValueError(f"grad: wanted [B, H, W, V], got {tuple(grad.shape)}")
    batch, height, width, columns = grad.shape
    _check_map(height, width)
    _check("tps_grid", coefficients, control_points, height * width)
    check_like("grad", grad, (batch, height, width, coefficients.shape[2]), coefficients)
    return evaluate_backward(
        "tps_grid",
        grad.reshape(batch, height * width, columns),
        coefficients,
        control_points,
        None,
        (height, width),
        align_corners,
    )
