"""The solve for thin-plate splines in Triton: ``gsalign_triton::tps_solve`` and its backward."""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gsalign_kernels.reference.tps import raise_unless_solved
from gsalign_kernels.triton.launch import (
    ceil_div,
    check_available,
    check_like,
    checked_grid,
    device_of,
    power_of_two,
)

MAX_CONTROL_POINTS = 1024
"""As for :func:`gsalign_kernels.tps_solve`; a program's vectors hold as many."""

_DTYPES = (torch.float32, torch.float64)


@lru_cache(maxsize=1)
def _kernels() -> Any:
    return importlib.import_module("gsalign_kernels.triton.tps_solve_kernels")


def _check(control_points: Tensor) -> None:
    check_available("tps_solve", control_points)
    if control_points.dtype not in _DTYPES:
        raise TypeError(f"control_points: wanted float32 or float64, got {control_points.dtype}")
    if control_points.dim() != 3 or control_points.shape[2] != 2:
        raise ValueError(f"control_points: wanted [B, K, 2], got {tuple(control_points.shape)}")
    points = control_points.shape[1]
    if not 3 <= points <= MAX_CONTROL_POINTS:
        raise ValueError(f"control_points: wanted 3 to {MAX_CONTROL_POINTS} points, got {points}")


def _columns_of(tensor: Tensor) -> int:
    return tensor.shape[2] if tensor.dim() == 3 else 0


def _factors_of(points: int) -> int:
    return points * (points + 1) // 2 + 3 * points + 3


def _substitute(
    right_hand_side: Tensor, factors: Tensor, output: Tensor, leading: Tensor, adjoint: bool
) -> None:
    batch, rows, columns = right_hand_side.shape
    points = output.shape[1] - 3
    order = power_of_two(points, 8, MAX_CONTROL_POINTS)
    # Eight values per thread of one warp, so that none is spilled.
    block = power_of_two(columns, 2, max(2, min(8, 256 // order)))
    blocks = ceil_div(columns, block)
    with device_of(output):
        _kernels().substitute_kernel[checked_grid("tps_solve", batch * blocks)](
            right_hand_side,
            factors,
            output,
            leading,
            points,
            rows,
            columns,
            blocks,
            ADJOINT=adjoint,
            N=order,
            BLOCK_V=block,
            # One warp exchanges rows without a barrier, and is enough up to 128 points.
            num_warps=max(1, order * block // 256),
        )


@torch.library.custom_op(
    "gsalign_triton::tps_solve",
    mutates_args=(),
    schema="(Tensor control_points, Tensor values, float regularization, bool check_errors)"
    " -> (Tensor coefficients, Tensor factors, Tensor info)",
)
def tps_solve(
    control_points: Tensor, values: Tensor, regularization: float, check_errors: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward pass; arguments as :func:`gsalign_kernels.tps_solve`, checked again.

    Returns:
        coefficients: ``[B, K+3, V]``, NaN for samples that were not solved.
        factors: for the backward pass.
        info: ``[B]``, int32: 0 solved, 1 singular, 2 control points not finite.
    """
    _check(control_points)
    batch, points, _ = control_points.shape
    columns = _columns_of(values)
    check_like("values", values, (batch, points, columns), control_points)
    control_points, values = control_points.contiguous(), values.contiguous()
    coefficients = values.new_empty((batch, points + 3, columns))
    factors = values.new_empty((batch, _factors_of(points)), dtype=torch.float64)
    info = torch.empty((batch,), dtype=torch.int32, device=values.device)
    if batch == 0:
        return coefficients, factors, info
    order = power_of_two(points, 8, MAX_CONTROL_POINTS)
    block = power_of_two(points, 8, 32)
    tiles = ceil_div(points, block)
    vanishing_pivots = factors.new_empty((batch,))
    kernels = _kernels()
    with device_of(values):
        kernels.assemble_kernel[checked_grid("tps_solve", batch * tiles * tiles)](
            control_points,
            factors,
            points,
            tiles,
            BLOCK_I=block,
            BLOCK_J=block,
            num_warps=block // 8,
        )
        warps = power_of_two(order // 32, 1, 16)
        kernels.transform_kernel[checked_grid("tps_solve", batch)](
            control_points,
            factors,
            info,
            vanishing_pivots,
            regularization,
            points,
            N=order,
            BLOCK_J=4,
            num_warps=warps,
        )
        kernels.cholesky_kernel[checked_grid("tps_solve", batch)](
            factors,
            info,
            vanishing_pivots,
            points,
            N=order,
            BLOCK_J=8,
            num_warps=warps,
        )
    if columns > 0:
        _substitute(values, factors, coefficients, coefficients, adjoint=False)
    if check_errors:
        raise_unless_solved(info)
    return coefficients, factors, info


@torch.library.custom_op(
    "gsalign_triton::tps_solve_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor coefficients, Tensor control_points, Tensor factors)"
    " -> (Tensor, Tensor)",
)
def tps_solve_backward(
    grad: Tensor, coefficients: Tensor, control_points: Tensor, factors: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of control points and values: the same system, solved again with the factors."""
    _check(control_points)
    batch, points, _ = control_points.shape
    columns = _columns_of(coefficients)
    shape = (batch, points + 3, columns)
    check_like("coefficients", coefficients, shape, control_points)
    check_like("grad", grad, shape, control_points)
    like = torch.empty(0, dtype=torch.float64, device=control_points.device)
    check_like("factors", factors, (batch, _factors_of(points)), like)
    grad, coefficients, control_points, factors = (
        t.contiguous() for t in (grad, coefficients, control_points, factors)
    )
    grad_points = torch.empty_like(control_points)
    grad_values = grad.new_empty((batch, points, columns))
    if grad.numel() == 0:
        return grad_points.zero_(), grad_values
    solution = factors.new_empty(shape)
    _substitute(grad, factors, solution, grad_values, adjoint=True)
    block = power_of_two(points, 8, 32)
    blocks = ceil_div(points, block)
    with device_of(grad):
        _kernels().adjoint_kernel[checked_grid("tps_solve", batch * blocks)](
            solution,
            coefficients,
            control_points,
            grad_points,
            points,
            columns,
            blocks,
            BLOCK_I=block,
            BLOCK_J=16,
            num_warps=block // 8,
        )
    return grad_points, grad_values
