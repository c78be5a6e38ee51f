"""Thin-plate splines in plain PyTorch: solve, evaluate, dense grid.

The spline through values ``v_i`` at control points ``c_i`` is
``f(p) = sum_i w_i U(|p - c_i|^2) + a_0 + a_x x + a_y y``, ``U(r2) = r2/2 log(max(r2, 1e-8))``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from gsalign_kernels.reference.precision import without_autocast

SMALLEST_SQUARED_DISTANCE = 1e-8


def computation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 when any argument is, else float32: half types only ever store, never compute."""
    return torch.float64 if torch.float64 in [t.dtype for t in tensors] else torch.float32


def radial_basis(squared_distance: Tensor) -> Tensor:
    """``U(r2) = r2/2 * log(max(r2, 1e-8))``; zero, with a finite gradient, at zero."""
    return 0.5 * squared_distance * squared_distance.clamp(min=SMALLEST_SQUARED_DISTANCE).log()


def squared_distances(points: Tensor, centres: Tensor) -> Tensor:
    """``|p_n - c_k|^2`` as ``[..., N, K]``, from differences: expanding the square cancels."""
    difference = points.unsqueeze(-2) - centres.unsqueeze(-3)
    return difference.square().sum(-1)


def affine_terms(points: Tensor) -> Tensor:
    """``[1, x, y]`` for every point: ``[..., N, 2] -> [..., N, 3]``."""
    return torch.cat([torch.ones_like(points[..., :1]), points], dim=-1)


def system_matrix(control_points: Tensor, regularization: float) -> Tensor:
    """The symmetric matrix ``[[Phi + reg I, P], [P^T, 0]]`` of the interpolation conditions."""
    count = control_points.shape[-2]
    kernel = radial_basis(squared_distances(control_points, control_points))
    if regularization:
        identity = torch.eye(count, dtype=kernel.dtype, device=kernel.device)
        kernel = kernel + regularization * identity
    affine = affine_terms(control_points)
    top = torch.cat([kernel, affine], dim=-1)
    corner = control_points.new_zeros(*control_points.shape[:-2], 3, 3)
    bottom = torch.cat([affine.transpose(-1, -2), corner], dim=-1)
    return torch.cat([top, bottom], dim=-2)


def solve_dtype(device: torch.device) -> torch.dtype:
    """What systems are solved in: float64, but on devices that have none."""
    return torch.float32 if device.type == "mps" else torch.float64


def tps_solve(
    control_points: Tensor, values: Tensor, regularization: float
) -> tuple[Tensor, Tensor]:
    """Coefficients ``[B, K+3, V]`` of the splines: weights, then ``a_0, a_x, a_y``; and info.

    Info ``[B]``, int32: 0 solved, 1 singular (a pivot vanishes beside the matrix), 2 control points
    not finite. The coefficients of samples that were not solved are NaN.
    """
    dtype = computation_dtype(control_points, values)
    wide = solve_dtype(control_points.device)
    points = control_points.to(wide)
    finite = points.isfinite().flatten(1).all(dim=1)
    matrix = system_matrix(points, regularization)
    padding = values.new_zeros(values.shape[0], 3, values.shape[2], dtype=wide)
    right_hand_side = torch.cat([values.to(wide), padding], dim=1)
    # Whether a system is singular is asked of its figures alone.
    constant = torch.where(finite[:, None, None], matrix.detach(), 0.0)
    pivots = torch.linalg.lu_factor_ex(constant)[0].diagonal(dim1=-2, dim2=-1).abs().amin(-1)
    largest = constant.abs().flatten(1).amax(-1)
    singular = pivots <= matrix.shape[-1] * torch.finfo(wide).eps * largest
    info = torch.where(finite, singular.to(torch.int32), 2).to(torch.int32)
    # Solve a harmless system in place of one that cannot be, then leave no figure of it.
    solvable = (info == 0)[:, None, None]
    identity = torch.eye(matrix.shape[-1], dtype=wide, device=matrix.device)
    with without_autocast(matrix):
        solved = torch.linalg.solve(torch.where(solvable, matrix, identity), right_hand_side)
    return torch.where(solvable, solved, torch.nan).to(dtype), info


def raise_unless_solved(info: Tensor) -> None:
    """Raise for the first sample whose info is not 0; reads the figures, so waits for a device.

    Where there are no figures (compiling, exporting, tensors without data) nothing is raised. Under
    ``vmap`` samples are counted through the mapped axes.

    Raises:
        RuntimeError: names the sample and what is wrong with its control points.
    """
    if torch.compiler.is_compiling() or info.is_meta or isinstance(info, FakeTensor):
        return
    while torch._C._functorch.is_functorch_wrapped_tensor(info):
        info = torch._C._functorch.get_unwrapped(info)
    for sample, outcome in enumerate(_flat(info.tolist())):
        if outcome == 1:
            raise RuntimeError(
                f"control_points: those of sample {sample} give a singular system; "
                "some are equal, or all lie on one line"
            )
        if outcome == 2:
            raise RuntimeError(f"control_points: those of sample {sample} are not finite")


def _flat(nested: Any) -> list[int]:
    # In Python: an operation on the tensor would be wrapped again by the transforms around it.
    return [n for inner in nested for n in _flat(inner)] if isinstance(nested, list) else [nested]


def tps_evaluate(coefficients: Tensor, control_points: Tensor, points: Tensor) -> Tensor:
    """Splines at points: ``[B, K+3, V], [B, K, 2], [B, N, 2] -> [B, N, V]``."""
    dtype = computation_dtype(coefficients, control_points, points)
    points = points.to(dtype)
    kernel = radial_basis(squared_distances(points, control_points.to(dtype)))
    design = torch.cat([kernel, affine_terms(points)], dim=-1)
    with without_autocast(design):
        return design @ coefficients.to(dtype)


def lattice(
    size: tuple[int, int],
    *,
    align_corners: bool,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> Tensor:
    """Positions ``(x, y)`` of the pixels of an H x W map in [-1, 1], row-major ``[H*W, 2]``.

    With ``align_corners`` the corner pixels' centres lie at -1 and 1 (a map of one row or column
    has its centre at -1, as ``torch.nn.functional.grid_sample`` reads it); without, the corner
    pixels' outer edges do.
    """
    axes = []
    for length in size:
        index = torch.arange(length, dtype=dtype, device=device)
        if align_corners:
            axes.append(index * (2.0 / max(length - 1, 1)) - 1.0)
        else:
            axes.append((2.0 * index + 1.0) / length - 1.0)
    y, x = torch.meshgrid(axes[0], axes[1], indexing="ij")
    return torch.stack([x, y], dim=-1).reshape(-1, 2)


def tps_grid(
    coefficients: Tensor, control_points: Tensor, size: tuple[int, int], align_corners: bool
) -> Tensor:
    """Splines at every pixel: ``[B, K+3, V], [B, K, 2] -> [B, H, W, V]``."""
    dtype = computation_dtype(coefficients, control_points)
    points = lattice(size, align_corners=align_corners, dtype=dtype, device=coefficients.device)
    dense = tps_evaluate(coefficients, control_points, points.expand(coefficients.shape[0], -1, -1))
    return dense.unflatten(1, size)
