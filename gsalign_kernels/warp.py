"""Warps with the grid made on the fly: token maps by rotated control points, images by splines."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gsalign_kernels import backends, checks, registration
from gsalign_kernels.reference import warp as reference
from gsalign_kernels.tps import tps_solve

MODES = ("bilinear", "nearest")
PADDING_MODES = ("zeros", "border", "reflection")


def warp_tokens(
    tokens: Tensor,
    source_points: Tensor,
    angle: Tensor,
    basis: Tensor,
    *,
    size: tuple[int, int],
    eta: float,
    prefix: int = 0,
    implementation: str | None = None,
) -> Tensor:
    """Adds to every map token ``eta`` times the token found where the warp reads: GSAlign's LTPS.

    With ``A = M S`` the map read without rotation and ``R`` the rotation
    ``(x, y) -> (x cos t - y sin t, x sin t + y cos t)``, sample ``b`` reads at
    ``G_b = A R(angle_b)^T``, and map tokens become ``x + eta * bilinear(x, G_b)``: coordinates
    ``(x, y)`` in [-1, 1], ``align_corners=True``, border padding, exactly as
    ``torch.nn.functional.grid_sample`` has it, NaN included (read at the first row or column).
    The grid stays float32 (float64 for float64 tokens) whatever the tokens are stored in; sums
    are made in that type. Gradients flow to tokens, source points and angle, and are the same to
    the last bit from run to run.

    Args:
        tokens: ``[B, prefix + H*W, C]``; ``prefix`` tokens that pass unchanged, then the map in
            row-major order.
        source_points: ``[K, 2]``, where the control points read before rotation, shared by the
            batch.
        angle: ``[B]``, radians.
        basis: ``[H*W, K]`` from :func:`gsalign_kernels.tps_basis`; a constant.
        size: ``(H, W)`` of the map.
        eta: weight of the warped map.
        prefix: number of tokens before the map.
        implementation: ``"reference"``, ``"cpp"``, ``"cuda"``, ``"triton"``, or None for the
            choice in force.

    Returns:
        Like ``tokens``, contiguous.

    Raises:
        TypeError: an argument is no floating-point tensor, or ``size`` no pair of integers.
        ValueError: a shape or device disagrees, or ``basis`` wants a gradient.
        KernelUnavailableError: the named implementation cannot run.
    """
    height, width = checks.check_size("size", size)
    checks.check_tensor("tokens", tokens, ("B", "prefix + H*W", "C"))
    if prefix < 0:
        raise ValueError(f"prefix: wanted a number of at least 0, got {prefix}")
    if tokens.shape[1] != prefix + height * width:
        raise ValueError(
            f"tokens: wanted prefix + H*W = {prefix} + {height}*{width} = "
            f"{prefix + height * width} tokens along dimension 1, got {tokens.shape[1]}"
        )
    checks.check_tensor("source_points", source_points, ("K", 2))
    checks.check_tensor("angle", angle, (tokens.shape[0],))
    checks.check_tensor("basis", basis, (height * width, source_points.shape[0]))
    checks.check_same_device(tokens=tokens, source_points=source_points, angle=angle, basis=basis)
    if basis.requires_grad:
        raise ValueError("basis: is a constant of the warp, but wants a gradient; .detach() it")
    if not math.isfinite(eta):
        raise ValueError(f"eta: wanted a finite number, got {eta}")
    dtype = checks.coordinates_dtype(tokens)
    source_points, angle, basis = checks.converted(dtype, source_points, angle, basis)
    chosen = backends.select("warp_tokens", tokens.device, implementation, tokens.dtype)
    if chosen == "reference":
        return reference.warp_tokens(
            tokens, source_points, angle, basis, (height, width), eta, prefix
        )
    return registration.call(
        "warp_tokens",
        chosen,
        tokens,
        source_points,
        angle,
        basis,
        height,
        width,
        float(eta),
        prefix,
    )


def warp_image(
    image: Tensor,
    control_points: Tensor,
    values: Tensor,
    *,
    size: tuple[int, int] | None = None,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool = True,
    implementation: str | None = None,
) -> Tensor:
    """Warps images so that the output at ``control_points`` shows the input at ``values``.

    Direction: from output to input. Output pixel ``p`` reads the image at ``f(p)``, where ``f``
    is the thin-plate spline with ``f(control_points_i) = values_i``; to move image content from
    ``a`` to ``b``, give ``a`` as the value of control point ``b``. Grid and sampling run in one
    kernel and the grid is never stored. Gradients flow to image, control points and values, the
    same to the last bit from run to run.

    Args:
        image: ``[B, C, H, W]``, contiguous or channels-last.
        control_points: ``[B, K, 2]``, or ``[K, 2]`` shared by the batch; ``(x, y)`` in [-1, 1].
        values: ``[B, K, 2]``, or ``[K, 2]`` shared by the batch.
        size: ``(height, width)`` of the output; None keeps the image's.
        mode: ``"bilinear"`` or ``"nearest"``.
        padding_mode: ``"zeros"``, ``"border"`` or ``"reflection"``, as in ``grid_sample``.
        align_corners: whether -1 and 1 mean the centres of the corner pixels or their edges.
        implementation: ``"reference"``, ``"cpp"``, ``"cuda"``, ``"triton"``, or None for the
            choice in force.

    Returns:
        ``[B, C, height, width]`` in the type of ``image``.

    Raises:
        TypeError: an argument is no floating-point tensor, or ``size`` no pair of integers.
        ValueError: a shape, device, mode or padding is not as above.
        RuntimeError: a sample's control points are repeated or collinear.
        KernelUnavailableError: the named implementation cannot run.
    """
    checks.check_tensor("image", image, ("B", "C", "H", "W"))
    checks.check_choice("mode", mode, MODES)
    checks.check_choice("padding_mode", padding_mode, PADDING_MODES)
    batch = image.shape[0]
    height, width = checks.check_size("size", tuple(image.shape[2:]) if size is None else size)
    if image.shape[2] < 1 or image.shape[3] < 1:
        raise ValueError(f"image: has no pixels, shape {checks.shape_text(image.shape)}")
    if isinstance(values, Tensor) and values.dim() == 2:
        values = values.unsqueeze(0).expand(batch, -1, -1)
    checks.check_tensor("values", values, (batch, "K", 2))
    shared = isinstance(control_points, Tensor) and control_points.dim() == 2
    each = control_points.unsqueeze(0).expand(batch, -1, -1) if shared else control_points
    checks.check_tensor("control_points", each, (batch, values.shape[1], 2))
    checks.check_same_device(image=image, control_points=control_points, values=values)
    chosen = backends.select("warp_image", image.device, implementation, image.dtype)
    dtype = checks.coordinates_dtype(image)
    control_points = control_points.to(dtype)
    # Shared ones are solved with as they are, which factors them once, and then only expanded.
    coefficients = tps_solve(
        control_points,
        values.to(dtype),
        implementation="reference" if chosen == "reference" else None,
    )
    if shared:
        control_points = control_points.unsqueeze(0).expand(batch, -1, -1)
    return sample_by_spline(
        image,
        coefficients,
        control_points,
        (height, width),
        mode,
        padding_mode,
        align_corners,
        chosen,
    )


def sample_by_spline(
    image: Tensor,
    coefficients: Tensor,
    control_points: Tensor,
    size: tuple[int, int],
    mode: str,
    padding_mode: str,
    align_corners: bool,
    chosen: str,
) -> Tensor:
    """The second half of :func:`warp_image`: the spline is solved, ``chosen`` samples along it."""
    if chosen == "reference":
        return reference.warp_image(
            image, coefficients, control_points, size, mode, padding_mode, align_corners
        )
    return registration.call(
        "warp_image",
        chosen,
        image,
        coefficients,
        control_points,
        *size,
        MODES.index(mode),
        PADDING_MODES.index(padding_mode),
        align_corners,
    )


def _contiguous_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _tokens_fake(
    tokens: Tensor,
    source_points: Tensor,
    angle: Tensor,
    basis: Tensor,
    height: int,
    width: int,
    eta: float,
    prefix: int,
) -> Tensor:
    return _contiguous_like(tokens)


def _tokens_backward_fake(
    grad: Tensor,
    tokens: Tensor,
    source_points: Tensor,
    angle: Tensor,
    basis: Tensor,
    height: int,
    width: int,
    eta: float,
    prefix: int,
) -> Any:
    return _contiguous_like(tokens), _contiguous_like(source_points), _contiguous_like(angle)


def _tokens_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.settings = inputs[4:]


def _tokens_backward(call: Any, ctx: Any, grad: Tensor) -> Any:
    grads = call(grad, *ctx.saved_tensors, *ctx.settings)
    return *grads, None, None, None, None, None


def _image_fake(
    image: Tensor,
    coefficients: Tensor,
    control_points: Tensor,
    height: int,
    width: int,
    mode: int,
    padding_mode: int,
    align_corners: bool,
) -> Tensor:
    return image.new_empty(image.shape[0], image.shape[1], height, width)


def _image_backward_fake(
    grad: Tensor,
    image: Tensor,
    coefficients: Tensor,
    control_points: Tensor,
    mode: int,
    padding_mode: int,
    align_corners: bool,
) -> Any:
    return tuple(_contiguous_like(t) for t in (image, coefficients, control_points))


def _image_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.settings = inputs[5:]


def _image_backward(call: Any, ctx: Any, grad: Tensor) -> Any:
    grads = call(grad, *ctx.saved_tensors, *ctx.settings)
    return *grads, None, None, None, None, None


registration.define_triton("warp_tokens", "warp_image")

backends.declare("warp_tokens", "cpp", "cuda", "triton", without_float64=("cuda", "triton"))
backends.declare("warp_image", "cpp", "cuda", "triton", without_float64=("cuda", "triton"))
registration.register(
    "warp_tokens",
    fake=_tokens_fake,
    fake_backward=_tokens_backward_fake,
    setup_context=_tokens_setup,
    backward=_tokens_backward,
    float32_arguments=(1, 2, 3),
    shared_arguments=("source_points", "basis"),
)
registration.register(
    "warp_image",
    fake=_image_fake,
    fake_backward=_image_backward_fake,
    setup_context=_image_setup,
    backward=_image_backward,
    float32_arguments=(1, 2),
    shared_arguments=(),
)
