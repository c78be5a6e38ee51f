"""A 3 x 3 convolution of a token map, ReLU and the mean over the map, without the map between."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gsalign_kernels import backends, checks, registration
from gsalign_kernels.reference import conv as reference


def conv_relu_mean(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    size: tuple[int, int],
    prefix: int = 0,
    implementation: str | None = None,
) -> Tensor:
    """Mean over a token map of the ReLU of its 3 x 3 convolution, zeros around the map.

    What GSAlign's angle predictor begins with (paper, section LTPS). Read straight from the layout
    of tokens; the responses ``[B, O, H, W]`` are never written, of them only signs are kept for
    the backward pass. Gradients flow to tokens, weight and bias, the same to the last bit from run
    to run.

    ``cpp`` computes by Winograd's F(4x4, 3x3) in float32 (float64 for float64 tokens), whatever the
    type of the tokens and whatever autocast says; a NaN or an infinity in a map makes all means of
    its image NaN. The reference and ``triton`` convolve in the type of the tokens, or autocast's.

    Args:
        tokens: ``[B, prefix + H*W, C]``: first the ``prefix`` tokens, which are not read, then the
            map in row-major order.
        weight: ``[O, C, 3, 3]``, as of ``torch.nn.Conv2d``.
        bias: ``[O]``.
        size: ``(H, W)``.
        prefix: tokens before the map.
        implementation: ``"reference"``, ``"cpp"``, ``"triton"``, or None for the choice in force.

    Returns:
        ``[B, O]``, float32; float64 for float64 tokens.

    Raises:
        TypeError: an argument is no floating-point tensor, or ``size`` no pair of integers.
        ValueError: a shape or device disagrees, or there are no channels.
        KernelUnavailableError: the named implementation cannot run.
    """
    height, width = checks.check_size("size", size)
    if prefix < 0:
        raise ValueError(f"prefix: wanted 0 or more, got {prefix}")
    checks.check_tensor("tokens", tokens, ("B", prefix + height * width, "C"))
    if tokens.shape[2] == 0:
        raise ValueError(
            f"tokens: wanted at least one channel, got shape {checks.shape_text(tokens.shape)}"
        )
    checks.check_tensor("weight", weight, ("O", tokens.shape[2], 3, 3))
    if weight.shape[0] == 0:
        raise ValueError(
            f"weight: wanted at least one output, got shape {checks.shape_text(weight.shape)}"
        )
    checks.check_tensor("bias", bias, (weight.shape[0],))
    checks.check_same_device(tokens=tokens, weight=weight, bias=bias)
    chosen = backends.select("conv_relu_mean", tokens.device, implementation, tokens.dtype)
    if chosen == "reference":
        return reference.conv_relu_mean(tokens, weight, bias, (height, width), prefix)
    if chosen == "triton" and torch.is_autocast_enabled(tokens.device.type):
        # As autocast has convolutions: a GPU multiplies half types many times as fast.
        tokens = tokens.to(torch.get_autocast_dtype(tokens.device.type))
    weight, bias = checks.converted(checks.coordinates_dtype(tokens), weight, bias)
    mean, _ = registration.call(
        "conv_relu_mean", chosen, tokens, weight, bias, height, width, prefix
    )
    return mean


def _fake(
    tokens: Tensor, weight: Tensor, bias: Tensor, height: int, width: int, prefix: int
) -> Any:
    batch, outputs = tokens.shape[0], weight.shape[0]
    signs = tokens.new_empty(batch, height * width, (outputs + 7) // 8, dtype=torch.uint8)
    return weight.new_empty(batch, outputs), signs


def _backward_fake(
    grad: Tensor,
    tokens: Tensor,
    weight: Tensor,
    signs: Tensor,
    height: int,
    width: int,
    prefix: int,
) -> Any:
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(tokens, memory_format=contiguous),
        torch.empty_like(weight, memory_format=contiguous),
        weight.new_empty(weight.shape[0]),
    )


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    tokens, weight, _, *ctx.settings = inputs
    _, signs = output
    ctx.mark_non_differentiable(signs)
    ctx.save_for_backward(tokens, weight, signs)


def _backward(call: Any, ctx: Any, grad: Tensor, _: Any) -> Any:
    return *call(grad, *ctx.saved_tensors, *ctx.settings), None, None, None


registration.define_triton("conv")

backends.declare(
    "conv_relu_mean", "cpp", "triton", without_float64=("triton",), only_by_name=("triton",)
)
registration.register(
    "conv_relu_mean",
    fake=_fake,
    fake_backward=_backward_fake,
    setup_context=_setup,
    backward=_backward,
    float32_arguments=(1, 2),
    shared_arguments=("weight", "bias"),
)
