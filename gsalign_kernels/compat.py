"""kornia's thin-plate-spline functions, served by the fused operators: change one import.

``get_tps_transform``, ``warp_points_tps`` and ``warp_image_tps`` take and return what
``kornia.geometry.transform`` has under these names (0.9): argument order, shapes, defaults,
numbers. The dense map and the grid are never stored where a fused operator serves the call.

Where results differ from kornia's, they are more exact: distances come from differences (kornia
expands the square, which cancels), and half types are computed in float32 and rounded once. One
difference is of definition: ``U(r2) = r2/2 log(max(r2, 1e-8))`` is kornia's ``r2/2 log(r2)`` only
from a distance of 1e-4 on; below, the two differ by less than 2e-9, and coefficients made here
belong to the former. ``docs/compat.md`` has the details.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsalign_kernels import backends, checks, warp
from gsalign_kernels import tps as splines
from gsalign_kernels.errors import KernelUnavailableError
from gsalign_kernels.reference import tps as reference
from gsalign_kernels.reference.precision import without_autocast


def get_tps_transform(
    points_src: Tensor,
    points_dst: Tensor,
    *,
    classical: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights of a spline from source to target points: ``f(points_src) = points_dst``.

    kornia's matrix holds ``U(|src_i - dst_j|^2)``, its kernel centres are the target points. That
    interpolates, but is not the thin-plate spline: it bends more than it must, and without bound
    where source and target points make the matrix nearly singular. The default reproduces it, for
    models trained with it. ``classical=True`` makes the thin-plate spline of Bookstein (1989), the
    one of least bending, whose centres are the *source* points.

    As with kornia, images want the reversed call, because a warp reads from output to input: with
    ``get_tps_transform(points_dst, points_src)`` the content at ``points_src`` moves to
    ``points_dst``, and the centres to hand on are ``points_src``, or ``points_dst`` if classical:
    the second argument, or the first.

    Args:
        points_src: ``[B, N, 2]``, ``(x, y)``, N of at least 3.
        points_dst: ``[B, N, 2]``.
        classical: the thin-plate spline, with ``points_src`` as centres, instead of kornia's.
        implementation: of :func:`gsalign_kernels.tps_solve`, which serves ``classical``; kornia's
            matrix is not symmetric and is solved by PyTorch.

    Returns:
        Kernel weights ``[B, N, 2]`` and affine weights ``[B, 3, 2]`` (constant, x, y), in the type
        of the points.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: a shape or device disagrees.
        RuntimeError: the system is singular.
        KernelUnavailableError: the named implementation cannot run.
    """
    checks.check_tensor("points_src", points_src, ("B", "N", 2))
    checks.check_tensor("points_dst", points_dst, tuple(points_src.shape))
    checks.check_same_device(points_src=points_src, points_dst=points_dst)
    count = points_src.shape[1]
    dtype = torch.promote_types(points_src.dtype, points_dst.dtype)
    if classical:
        solved = splines.tps_solve(points_src, points_dst, implementation=implementation)
    else:
        solved = _kornia_solve(points_src, points_dst)
    solved = solved.to(dtype)
    return solved[:, :count], solved[:, count:]


def warp_points_tps(
    points_src: Tensor,
    kernel_centers: Tensor,
    kernel_weights: Tensor,
    affine_weights: Tensor,
    *,
    implementation: str | None = None,
) -> Tensor:
    """Maps points, from source to target.

    ``f(p) = sum_i w_i U(|p - c_i|^2) + a_0 + a_x x + a_y y``. Differentiable in all
    arguments. A batch of 1 is shared by the others.

    Args:
        points_src: ``[B, N, 2]``, the points to map.
        kernel_centers: ``[B, K, 2]``; see :func:`get_tps_transform` for which of its arguments.
        kernel_weights: ``[B, K, V]``, V = 2 for points.
        affine_weights: ``[B, 3, V]``.
        implementation: of :func:`gsalign_kernels.tps_evaluate`.

    Returns:
        ``[B, N, V]`` in the arguments' common type.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: a shape or device disagrees.
        KernelUnavailableError: the named implementation cannot run.
    """
    checks.check_tensor("points_src", points_src, ("B", "N", 2))
    coefficients, centers = _spline(kernel_centers, kernel_weights, affine_weights)
    checks.check_same_device(points_src=points_src, kernel_centers=centers)
    batch = _common_batch(points_src=points_src, kernel_centers=centers)
    dtype = torch.promote_types(points_src.dtype, coefficients.dtype)
    points_src, coefficients, centers = (
        t.expand(batch, -1, -1) for t in (points_src, coefficients, centers)
    )
    chosen = _serving("tps_evaluate", centers, implementation)
    if chosen == "reference":
        return reference.tps_evaluate(coefficients, centers, points_src).to(dtype)
    return splines.tps_evaluate(coefficients, centers, points_src, implementation=chosen).to(dtype)


def warp_image_tps(
    image: Tensor,
    kernel_centers: Tensor,
    kernel_weights: Tensor,
    affine_weights: Tensor,
    align_corners: bool = False,
    padding_mode: str = "zeros",
    *,
    mode: str = "bilinear",
    implementation: str | None = None,
) -> Tensor:
    """Warps images, from output to input: output pixel ``p`` reads the image at ``f(p)``.

    So the weights are those of the reversed :func:`get_tps_transform`. Grid and bilinear sampling
    run in one kernel and the grid is never stored. Differentiable in all tensors. A batch of 1 of
    the spline is shared by the images.

    Args:
        image: ``[B, C, H, W]``.
        kernel_centers: ``[B, K, 2]``, ``(x, y)`` in [-1, 1]; see :func:`get_tps_transform` for
            which of its arguments.
        kernel_weights: ``[B, K, 2]``.
        affine_weights: ``[B, 3, 2]``.
        align_corners: whether -1 and 1 mean the centres of the corner pixels or their edges. False,
            as kornia has it and :func:`gsalign_kernels.warp_image` has not.
        padding_mode: ``"zeros"``, ``"border"`` or ``"reflection"``.
        mode: ``"bilinear"``, which is all that kornia has, or ``"nearest"``.
        implementation: of :func:`gsalign_kernels.warp_image`.

    Returns:
        ``[B, C, H, W]`` in the type of ``image``.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: a shape, device, mode or padding is not as above.
        KernelUnavailableError: the named implementation cannot run.
    """
    checks.check_tensor("image", image, ("B", "C", "H", "W"))
    checks.check_choice("mode", mode, warp.MODES)
    checks.check_choice("padding_mode", padding_mode, warp.PADDING_MODES)
    batch, _, height, width = image.shape
    if height < 1 or width < 1:
        raise ValueError(f"image: has no pixels, shape {checks.shape_text(image.shape)}")
    coefficients, centers = _spline(kernel_centers, kernel_weights, affine_weights)
    checks.check_shape("kernel_weights", kernel_weights, ("B", "K", 2))
    checks.check_same_device(image=image, kernel_centers=centers)
    if centers.shape[0] not in (1, batch):
        raise ValueError(
            f"kernel_centers: wanted a batch of {batch}, as image has, or 1, got {centers.shape[0]}"
        )
    dtype = checks.coordinates_dtype(image)
    coefficients, centers = (t.to(dtype).expand(batch, -1, -1) for t in (coefficients, centers))
    if align_corners and (height == 1 or width == 1):
        coefficients, centers = _centred(coefficients, centers, height, width)
    chosen = _serving("warp_image", centers, implementation, image.dtype)
    return warp.sample_by_spline(
        image,
        coefficients,
        centers,
        (height, width),
        mode,
        padding_mode,
        align_corners,
        chosen,
    )


def _kornia_solve(points_src: Tensor, points_dst: Tensor) -> Tensor:
    wide = reference.solve_dtype(points_src.device)
    source, target = points_src.to(wide), points_dst.to(wide)
    kernel = reference.radial_basis(reference.squared_distances(source, target))
    affine = reference.affine_terms(source)
    zeros = source.new_zeros(source.shape[0], 3, 3)
    matrix = torch.cat(
        [torch.cat([kernel, affine], -1), torch.cat([affine.transpose(1, 2), zeros], -1)], 1
    )
    with without_autocast(matrix):
        return torch.linalg.solve(matrix, torch.cat([target, zeros[..., :2]], 1))


def _spline(centers: object, weights: object, affine: object) -> tuple[Tensor, Tensor]:
    """Coefficients ``[B, K+3, V]`` as tps_solve lays them out, and the checked centres."""
    centers = checks.check_tensor("kernel_centers", centers, ("B", "K", 2))
    weights = checks.check_tensor("kernel_weights", weights, ("B", "K", "V"))
    checks.check_shape("kernel_weights", weights, ("B", centers.shape[1], "V"))
    affine = checks.check_tensor("affine_weights", affine, ("B", 3, weights.shape[2]))
    checks.check_same_device(kernel_centers=centers, kernel_weights=weights, affine_weights=affine)
    batch = _common_batch(kernel_centers=centers, kernel_weights=weights, affine_weights=affine)
    dtype = torch.promote_types(weights.dtype, affine.dtype)
    dtype = torch.promote_types(dtype, centers.dtype)
    parts = [t.to(dtype).expand(batch, -1, -1) for t in (weights, affine)]
    return torch.cat(parts, dim=1), centers.to(dtype).expand(batch, -1, -1)


def _common_batch(**tensors: Tensor) -> int:
    lengths = {name: tensor.shape[0] for name, tensor in tensors.items()}
    common = next((length for length in lengths.values() if length != 1), 1)
    for name, length in lengths.items():
        if length not in (1, common):
            raise ValueError(f"{name}: wanted a batch of {common} or 1, got {length}")
    return common


def _serving(
    operator: str,
    centers: Tensor,
    implementation: str | None,
    dtype: torch.dtype | None = None,
) -> str:
    """Who serves a spline with these centres: kornia sets no bounds to their number."""
    count, most = centers.shape[1], splines.MAXIMUM_CONTROL_POINTS
    if 3 <= count <= most:
        return backends.select(operator, centers.device, implementation, dtype)
    if implementation not in (None, "auto", "reference"):
        raise KernelUnavailableError(
            f"{operator}: {implementation} holds 3 to {most} kernel centres, got {count}. "
            f"What can: reference"
        )
    return "reference"


def _centred(
    coefficients: Tensor, centers: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """The spline shifted so that an axis of one pixel is read at 0, as kornia has it, not at -1."""
    offset = centers.new_tensor([float(width == 1), float(height == 1)])
    kernel, constant, slopes = coefficients.split([centers.shape[1], 1, 2], dim=1)
    constant = constant + (offset[:, None] * slopes).sum(1, keepdim=True)
    return torch.cat([kernel, constant, slopes], dim=1), centers - offset
