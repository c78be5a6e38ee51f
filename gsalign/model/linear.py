"""Linear layers and attention, by the fastest of PyTorch's own ways on a CPU.

PyTorch hands float32 products on a CPU to MKL, which leaves a quarter of an AMD processor's
arithmetic unused; oneDNN, which it also brings and uses for convolutions and half types, does not,
and takes GELU along. Everywhere else (GPUs, half types, compiled, traced, exported or transformed
programs, ``--kernels reference``) these are the plain functions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gsalign.model.precision import without_autocast
from gsalign_kernels import backends, transforms

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)


def plain_program() -> bool:
    """Whether operators run one by one as called: nothing compiles, traces or transforms them."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or transforms.in_transform()
    )


def _served_by_onednn(tokens: Tensor, weight: Tensor) -> bool:
    return (
        _HAS_ONEDNN
        and tokens.device.type == weight.device.type == "cpu"
        and tokens.dtype == weight.dtype == torch.float32
        and plain_program()
        and type(tokens) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and tokens.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
        and backends.choice_in_force() != "reference"
    )


def _onednn(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none"
) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(tokens, weight, bias, activation, [], "none")


class _Linear(torch.autograd.Function):
    """``tokens @ weight.T + bias`` whose three products, forward and backward, are oneDNN's.

    The backward pass is made of the same products, and so can be differentiated again.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(tokens, weight)
        return _onednn(tokens, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        tokens, weight = ctx.saved_tensors
        needs_tokens, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        grad_tokens = grad_weight = grad_bias = None
        if needs_tokens:
            grad_tokens = linear(grad, weight.t(), None)
        if needs_weight:
            grad_weight = linear(rows.t(), tokens.flatten(0, -2).t(), None)
        if needs_bias:
            grad_bias = rows.sum(dim=0)
        return grad_tokens, grad_weight, grad_bias


def linear(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``torch.nn.functional.linear``; on a CPU in float32 by oneDNN.

    Args:
        tokens: ``[..., C]``.
        weight: ``[O, C]``.
        bias: ``[O]`` or None.

    Returns:
        ``[..., O]``.
    """
    if not _served_by_onednn(tokens, weight):
        return functional.linear(tokens, weight, bias)
    if torch.is_grad_enabled():
        return _Linear.apply(tokens, weight, bias)  # type: ignore[no-untyped-call]
    return _onednn(tokens, weight, bias)


def linear_gelu(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The exact GELU of :func:`linear`, in one pass where nothing is to be differentiated."""
    if not torch.is_grad_enabled() and _served_by_onednn(tokens, weight):
        return _onednn(tokens, weight, bias, "gelu")
    return functional.gelu(linear(tokens, weight, bias))


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scaled dot-product attention ``[B, h, N, c], [B, h, M, c], [B, h, M, c] -> [B, h, N, c]``.

    On a CPU in half types two batched products around a softmax take two thirds of the time of
    PyTorch's fused attention, where there is no gradient to keep the weights for.
    """
    half = query.dtype in (torch.float16, torch.bfloat16)
    if not half or query.device.type != "cpu" or torch.is_grad_enabled() or not plain_program():
        return functional.scaled_dot_product_attention(query, key, value)
    with without_autocast(query):
        weights = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        return weights.softmax(dim=-1) @ value
