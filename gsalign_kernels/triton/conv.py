"""Convolution, ReLU and mean in Triton: ``gsalign_triton::conv_relu_mean`` and its backward."""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gsalign_kernels.reference.conv import response_gradients
from gsalign_kernels.reference.precision import without_autocast
from gsalign_kernels.triton.launch import (
    ceil_div,
    check_available,
    check_like,
    checked_grid,
    device_of,
    interpreted,
    power_of_two,
)

TAPS = 3


@lru_cache(maxsize=1)
def _kernels() -> Any:
    return importlib.import_module("gsalign_kernels.triton.conv_kernels")


def _check(tokens: Tensor, weight: Tensor, height: int, width: int, prefix: int) -> None:
    check_available("conv_relu_mean", tokens)
    if tokens.dim() != 3 or tokens.dtype == torch.float64 or not tokens.is_floating_point():
        raise ValueError(
            f"tokens: wanted [B, N, C] in float32, float16 or bfloat16, got {tuple(tokens.shape)} "
            f"in {tokens.dtype}"
        )
    if min(height, width) < 1 or prefix < 0 or tokens.shape[1] != prefix + height * width:
        raise ValueError(
            f"tokens: wanted {prefix} + {height} * {width} of them, got {tokens.shape[1]}"
        )
    outputs = weight.shape[0] if weight.dim() == 4 else -1
    single = tokens.new_empty(0, dtype=torch.float32)
    check_like("weight", weight, (outputs, tokens.shape[2], TAPS, TAPS), single)


def _precision() -> str:
    """How float32 is multiplied: as PyTorch's convolutions are allowed to."""
    # Not allow_tf32, which raises where only this newer setting was made; the older sets it too.
    setting = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if setting == "tf32" else "ieee"


@torch.library.custom_op(
    "gsalign_triton::conv_relu_mean",
    mutates_args=(),
    schema="(Tensor tokens, Tensor weight, Tensor bias, int height, int width, int prefix)"
    " -> (Tensor mean, Tensor signs)",
)
def conv_relu_mean(
    tokens: Tensor, weight: Tensor, bias: Tensor, height: int, width: int, prefix: int
) -> tuple[Tensor, Tensor]:
    """Forward pass; arguments as :func:`gsalign_kernels.conv_relu_mean`, checked again.

    Half tokens are multiplied with kernels rounded to their type, summed in float32.

    Returns:
        mean: ``[B, O]``, float32.
        signs: ``[B, H*W, ceil(O / 8)]``, uint8: which responses are positive.
    """
    _check(tokens, weight, height, width, prefix)
    outputs, channels = weight.shape[:2]
    check_like("bias", bias, (outputs,), weight)
    batch, positions, sign_bytes = tokens.shape[0], height * width, ceil_div(outputs, 8)
    mean = weight.new_empty((batch, outputs))
    signs = tokens.new_empty((batch, positions, sign_bytes), dtype=torch.uint8)
    if mean.numel() == 0:
        return mean, signs
    if tokens.stride(2) != 1:
        tokens = tokens.contiguous()
    # The interpreter's products of bfloat16 are wrong; float32 holds the same figures.
    dtype = torch.float32 if interpreted() and tokens.dtype == torch.bfloat16 else tokens.dtype
    taps = weight.to(tokens.dtype).to(dtype).permute(2, 3, 1, 0).contiguous()
    tokens = tokens.to(dtype)
    block, rows = power_of_two(outputs, 16, 64), power_of_two(positions, 16, 128)
    output_blocks = ceil_div(outputs, block)
    with device_of(tokens):
        _kernels().forward_kernel[checked_grid("conv_relu_mean", batch * output_blocks)](
            tokens,
            taps,
            bias.contiguous(),
            mean,
            signs,
            tokens.stride(0),
            tokens.stride(1),
            channels,
            outputs,
            height,
            width,
            prefix,
            sign_bytes,
            output_blocks,
            BLOCK_N=rows,
            BLOCK_C=power_of_two(channels, 16, 64 if dtype.itemsize == 2 else 32),
            BLOCK_O=block,
            PRECISION=_precision() if dtype == torch.float32 else "ieee",
            num_warps=8 if rows == 128 else 4,  # four would spill
            num_stages=3,
        )
    return mean, signs


@torch.library.custom_op(
    "gsalign_triton::conv_relu_mean_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor tokens, Tensor weight, Tensor signs, int height, int width,"
    " int prefix) -> (Tensor, Tensor, Tensor)",
)
def conv_relu_mean_backward(
    grad: Tensor,
    tokens: Tensor,
    weight: Tensor,
    signs: Tensor,
    height: int,
    width: int,
    prefix: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of tokens, weight and bias: the kept signs, then PyTorch's own backward pass."""
    _check(tokens, weight, height, width, prefix)
    outputs = weight.shape[0]
    check_like("grad", grad, (tokens.shape[0], outputs), weight)
    kept = (tokens.shape[0], height * width, ceil_div(outputs, 8))
    check_like("signs", signs, kept, tokens.new_empty(0, dtype=torch.uint8))
    tokens = tokens.contiguous()  # PyTorch sums strided ones in another order
    image = tokens[:, prefix:].transpose(1, 2).unflatten(2, (height, width))
    upstream = response_gradients(grad, signs)
    grad_bias = upstream.sum(dim=(0, 1))
    upstream = upstream.to(tokens.dtype).transpose(1, 2).unflatten(2, (height, width))
    with without_autocast(tokens):
        by_image, by_weight, _ = torch.ops.aten.convolution_backward.default(
            upstream,
            image,
            weight.to(tokens.dtype),
            None,
            [1, 1],
            [1, 1],
            [1, 1],
            False,
            [0, 0],
            1,
            [True, True, False],
        )
    grad_tokens = torch.zeros_like(tokens, memory_format=torch.contiguous_format)
    grad_tokens[:, prefix:] = by_image.flatten(2).transpose(1, 2)
    return grad_tokens, by_weight.to(weight.dtype).contiguous(), grad_bias
