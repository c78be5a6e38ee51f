"""Thin-plate splines: solve for the coefficients, evaluate at points, on a grid, as a basis.

Direction: a spline maps *output* positions to *input* positions. The control points lie where the
output is, the values say where each of them reads the input, and ``grid_sample`` or
:func:`gsalign_kernels.warp_image` use the evaluated map as the reading position.

Coordinates are ``(x, y)`` in [-1, 1]. Half-precision arguments are computed and returned in
float32, since a half-precision coordinate is off by up to a tenth of a pixel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gsalign_kernels import backends, basis_cache, checks, registration
from gsalign_kernels.reference import tps as reference

MAXIMUM_CONTROL_POINTS = 1024
"""Beyond this the fused solve's dense factors stop being a sensible way to a spline."""


class TpsSolution(NamedTuple):
    """What :func:`tps_solve_ex` returns.

    Attributes:
        coefficients: ``[B, K+3, V]``; NaN throughout for a sample that could not be solved.
        info: ``[B]``, int32. 0: solved. 1: the system is singular, control points are repeated or
            all on one line. 2: control points are not finite.
    """

    coefficients: Tensor
    info: Tensor


def tps_solve(
    control_points: Tensor,
    values: Tensor,
    *,
    regularization: float = 0.0,
    check_errors: bool | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Coefficients of the thin-plate splines that take ``values`` at ``control_points``.

    Solves ``[[Phi + reg I, P], [P^T, 0]] [w; a] = [v; 0]`` with
    ``Phi_ij = U(|c_i - c_j|^2)``, ``U(r2) = r2/2 log(max(r2, 1e-8))`` and ``P = [1, x, y]``
    (Bookstein 1989), in float64 inside whatever the type. Differentiable in both arguments; the
    backward pass reuses the factors. Control points shared by the batch are factored once.

    Args:
        control_points: ``[B, K, 2]``, or ``[K, 2]`` shared by the batch; ``(x, y)`` in [-1, 1],
            K of at least 3, no two equal and not all on one line.
        values: ``[B, K, V]``, what the spline takes at each control point.
        regularization: added to the diagonal of Phi; 0 interpolates, more smooths.
        check_errors: whether control points that give no spline raise an error. None does so on the
            CPU, where it is free. On a GPU an error makes the host wait for the device (and cannot
            be asked for while a CUDA graph is captured), so None leaves it: such a sample's
            coefficients are NaN, and :func:`tps_solve_ex` tells why.
        implementation: ``"reference"``, ``"cpp"``, ``"cuda"``, ``"triton"``, or None for the choice
            in force.

    Returns:
        ``[B, K+3, V]``, K weights, then ``a_0, a_x, a_y``.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: a shape or device disagrees, or K is below 3.
        RuntimeError: with ``check_errors``, a sample's control points are repeated, collinear or
            not finite; names the first such sample.
        KernelUnavailableError: the named implementation cannot run.
    """
    if check_errors is None:
        check_errors = not (isinstance(values, Tensor) and values.is_cuda)
    return _solve(control_points, values, regularization, check_errors, implementation)[0]


def tps_solve_ex(
    control_points: Tensor,
    values: Tensor,
    *,
    regularization: float = 0.0,
    check_errors: bool = False,
    implementation: str | None = None,
) -> TpsSolution:
    """:func:`tps_solve` that tells per sample whether it was solved, as ``torch.linalg.solve_ex``.

    Never waits for a GPU unless ``check_errors`` asks for an error.

    Args:
        control_points: as in :func:`tps_solve`.
        values: as in :func:`tps_solve`.
        regularization: as in :func:`tps_solve`.
        check_errors: raise for the first sample that was not solved.
        implementation: as in :func:`tps_solve`.

    Returns:
        :class:`TpsSolution`, ``(coefficients, info)``.

    Raises:
        As :func:`tps_solve`.
    """
    return TpsSolution(
        *_solve(control_points, values, regularization, check_errors, implementation)
    )


def _solve(
    control_points: Tensor,
    values: Tensor,
    regularization: float,
    check_errors: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor]:
    checks.check_tensor("values", values, ("B", "K", "V"))
    shared = isinstance(control_points, Tensor) and control_points.dim() == 2
    control_points = _batched_control_points(control_points, values.shape[0])
    checks.check_shape("values", values, ("B", control_points.shape[1], "V"))
    checks.check_same_device(control_points=control_points, values=values)
    if not regularization >= 0.0:
        raise ValueError(f"regularization: wanted a number of at least 0, got {regularization}")
    dtype = reference.computation_dtype(control_points, values)
    control_points, values = checks.converted(dtype, control_points, values)
    chosen = backends.select("tps_solve", values.device, implementation)
    if chosen == "reference":
        coefficients, info = reference.tps_solve(control_points, values, regularization)
        if check_errors:
            reference.raise_unless_solved(info)
        return coefficients, info
    settings = (float(regularization), check_errors)
    if shared and values.shape[0] > 1:
        batch, count, columns = values.shape
        # One system for all: the samples' values are its right-hand sides.
        values = values.transpose(0, 1).reshape(1, count, batch * columns)
        coefficients, _, info = registration.call(
            "tps_solve", chosen, control_points[:1], values, *settings
        )
        coefficients = coefficients.view(count + 3, batch, columns).transpose(0, 1)
        return coefficients.contiguous(), info.expand(batch)
    coefficients, _, info = registration.call(
        "tps_solve", chosen, control_points, values, *settings
    )
    return coefficients, info


def tps_evaluate(
    coefficients: Tensor,
    control_points: Tensor,
    points: Tensor,
    *,
    implementation: str | None = None,
) -> Tensor:
    """Splines at points: ``f(p) = sum_i w_i U(|p - c_i|^2) + a_0 + a_x x + a_y y``.

    Differentiable in all three arguments.

    Args:
        coefficients: ``[B, K+3, V]`` from :func:`tps_solve`.
        control_points: ``[B, K, 2]`` or ``[K, 2]``, the ones solved with.
        points: ``[B, N, 2]``, or ``[N, 2]`` shared by the batch; ``(x, y)``.
        implementation: ``"reference"``, ``"cpp"``, ``"cuda"``, ``"triton"``, or None for the choice
            in force.

    Returns:
        ``[B, N, V]``.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: a shape or device disagrees.
        KernelUnavailableError: the named implementation cannot run.
    """
    control_points = _check_spline(coefficients, control_points)
    batch = coefficients.shape[0]
    if isinstance(points, Tensor) and points.dim() == 2:
        points = points.unsqueeze(0).expand(batch, -1, -1)
    checks.check_tensor("points", points, (batch, "N", 2))
    checks.check_same_device(coefficients=coefficients, points=points)
    dtype = reference.computation_dtype(coefficients, control_points, points)
    arguments = checks.converted(dtype, coefficients, control_points, points)
    chosen = backends.select("tps_evaluate", coefficients.device, implementation)
    if chosen == "reference":
        return reference.tps_evaluate(*arguments)
    return registration.call("tps_evaluate", chosen, *arguments)


def tps_grid(
    coefficients: Tensor,
    control_points: Tensor,
    size: tuple[int, int],
    *,
    align_corners: bool = True,
    implementation: str | None = None,
) -> Tensor:
    """Splines at every pixel of an H x W map; with V = 2 a grid for ``grid_sample``.

    The pixel positions are never stored. Differentiable in coefficients and control points.

    Args:
        coefficients: ``[B, K+3, V]`` from :func:`tps_solve`.
        control_points: ``[B, K, 2]`` or ``[K, 2]``, the ones solved with.
        size: ``(height, width)`` of the map.
        align_corners: whether -1 and 1 mean the centres of the corner pixels (True) or their
            outer edges; give the sampler the same.
        implementation: ``"reference"``, ``"cpp"``, ``"cuda"``, ``"triton"``, or None for the choice
            in force.

    Returns:
        ``[B, H, W, V]``.

    Raises:
        TypeError: an argument is no floating-point tensor, or ``size`` no pair of integers.
        ValueError: a shape or device disagrees.
        KernelUnavailableError: the named implementation cannot run.
    """
    control_points = _check_spline(coefficients, control_points)
    height, width = checks.check_size("size", size)
    dtype = reference.computation_dtype(coefficients, control_points)
    coefficients, control_points = checks.converted(dtype, coefficients, control_points)
    chosen = backends.select("tps_grid", coefficients.device, implementation)
    if chosen == "reference":
        return reference.tps_grid(coefficients, control_points, (height, width), align_corners)
    return registration.call(
        "tps_grid", chosen, coefficients, control_points, height, width, align_corners
    )


def tps_basis(
    control_points: Tensor,
    size: tuple[int, int],
    *,
    align_corners: bool = True,
    regularization: float = 0.0,
    implementation: str | None = None,
) -> Tensor:
    """The matrix that turns values at fixed control points into a dense map: ``map = M @ values``.

    ``M = Phi_grid L^-1[:, :K]``, the splines through the K unit vectors, computed in float64
    whatever the type of ``control_points``. With constant control points it replaces a solve per
    sample by one small matrix product, and is more exact than a float32 solve. It is a constant:
    no gradient flows to ``control_points``.

    Made once for equal control points and arguments, then copied (see
    ``gsalign_kernels.basis_cache``). Control points on a GPU are read again, which
    waits for the device, only when they are another tensor or were written to; writes through
    ``.data`` or from outside PyTorch are not seen, so clear the cache after one.

    Args:
        control_points: ``[K, 2]``, ``(x, y)`` in [-1, 1].
        size: ``(height, width)`` of the map.
        align_corners: as in :func:`tps_grid`.
        regularization: as in :func:`tps_solve`.
        implementation: ``"reference"``, ``"cpp"``, ``"cuda"``, ``"triton"``, or None for the choice
            in force.

    Returns:
        ``[H*W, K]`` in the type of ``control_points`` (float32 for half types), row-major in (row,
        column). Its rows sum to 1.

    Raises:
        TypeError: ``control_points`` is no floating-point tensor.
        ValueError: it is not ``[K, 2]`` with K of at least 3.
        RuntimeError: the control points are repeated or collinear.
        KernelUnavailableError: the named implementation cannot run.
    """
    checks.check_tensor("control_points", control_points, ("K", 2))

    def make() -> Tensor:
        points = control_points.detach().double()
        units = torch.eye(points.shape[0], dtype=torch.float64, device=points.device).unsqueeze(0)
        coefficients = tps_solve(
            points,
            units,
            regularization=regularization,
            check_errors=True,
            implementation=implementation,
        )
        dense = tps_grid(
            coefficients, points, size, align_corners=align_corners, implementation=implementation
        )
        return dense.flatten(0, 2).to(reference.computation_dtype(control_points))

    if basis_cache.passes_by(control_points):
        return make()
    settings = (*checks.check_size("size", size), bool(align_corners), float(regularization))
    device = control_points.device
    served_by = [backends.select(op, device, implementation) for op in ("tps_solve", "tps_grid")]
    return basis_cache.fetch(control_points, (*settings, *served_by), make)


def _batched_control_points(control_points: Tensor, batch: int) -> Tensor:
    if isinstance(control_points, Tensor) and control_points.dim() == 2:
        control_points = control_points.unsqueeze(0).expand(batch, -1, -1)
    checks.check_tensor("control_points", control_points, (batch, "K", 2))
    count = control_points.shape[1]
    if not 3 <= count <= MAXIMUM_CONTROL_POINTS:
        raise ValueError(
            f"control_points: wanted 3 to {MAXIMUM_CONTROL_POINTS} points, got {count}"
        )
    return control_points


def _check_spline(coefficients: Tensor, control_points: Tensor) -> Tensor:
    checks.check_tensor("coefficients", coefficients, ("B", "K+3", "V"))
    control_points = _batched_control_points(control_points, coefficients.shape[0])
    checks.check_shape("coefficients", coefficients, ("B", control_points.shape[1] + 3, "V"))
    checks.check_same_device(coefficients=coefficients, control_points=control_points)
    return control_points


def _solve_fake(
    control_points: Tensor, values: Tensor, regularization: float, check_errors: bool
) -> Any:
    batch, count, columns = values.shape
    factors = count * (count + 1) // 2 + 3 * count + 3
    return (
        values.new_empty(batch, count + 3, columns),
        values.new_empty(batch, factors, dtype=torch.float64),
        values.new_empty(batch, dtype=torch.int32),
    )


def _solve_backward_fake(
    grad: Tensor, coefficients: Tensor, control_points: Tensor, factors: Tensor
) -> Any:
    count = control_points.shape[1]
    return torch.empty_like(control_points, memory_format=torch.contiguous_format), grad.new_empty(
        grad.shape[0], count, grad.shape[2]
    )


def _solve_setup(ctx: Any, inputs: Any, output: Any) -> None:
    coefficients, factors, info = output
    ctx.mark_non_differentiable(factors, info)
    ctx.save_for_backward(coefficients, inputs[0], factors)


def _solve_backward(call: Any, ctx: Any, grad: Tensor, *_: Any) -> Any:
    grad_points, grad_values = call(grad, *ctx.saved_tensors)
    return grad_points, grad_values, None, None


def _evaluate_fake(coefficients: Tensor, control_points: Tensor, points: Tensor) -> Tensor:
    return coefficients.new_empty(points.shape[0], points.shape[1], coefficients.shape[2])


def _evaluate_backward_fake(
    grad: Tensor, coefficients: Tensor, control_points: Tensor, points: Tensor
) -> Any:
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (coefficients, control_points, points)
    )


def _evaluate_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _evaluate_backward(call: Any, ctx: Any, grad: Tensor) -> Any:
    return call(grad, *ctx.saved_tensors)


def _grid_fake(
    coefficients: Tensor, control_points: Tensor, height: int, width: int, align_corners: bool
) -> Tensor:
    return coefficients.new_empty(coefficients.shape[0], height, width, coefficients.shape[2])


def _grid_backward_fake(
    grad: Tensor, coefficients: Tensor, control_points: Tensor, align_corners: bool
) -> Any:
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (coefficients, control_points)
    )


def _grid_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.align_corners = inputs[4]


def _grid_backward(call: Any, ctx: Any, grad: Tensor) -> Any:
    return *call(grad, *ctx.saved_tensors, ctx.align_corners), None, None, None


registration.define_triton("tps", "tps_solve")

backends.declare("tps_solve", "cpp", "cuda", "triton")
backends.declare("tps_evaluate", "cpp", "cuda", "triton")
backends.declare("tps_grid", "cpp", "cuda", "triton")
backends.declare("tps_basis", "cpp", "cuda", "triton")
registration.register(
    "tps_solve",
    fake=_solve_fake,
    fake_backward=_solve_backward_fake,
    setup_context=_solve_setup,
    backward=_solve_backward,
    float32_arguments=(0, 1),
    shared_arguments=(),
)
registration.register(
    "tps_evaluate",
    fake=_evaluate_fake,
    fake_backward=_evaluate_backward_fake,
    setup_context=_evaluate_setup,
    backward=_evaluate_backward,
    float32_arguments=(0, 1, 2),
    shared_arguments=(),
)
registration.register(
    "tps_grid",
    fake=_grid_fake,
    fake_backward=_grid_backward_fake,
    setup_context=_grid_setup,
    backward=_grid_backward,
    float32_arguments=(0, 1),
    shared_arguments=(),
)
