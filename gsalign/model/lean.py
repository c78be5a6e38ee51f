"""Linear layers that do not keep what a cheap function before them made.

A linear layer keeps its input for the backward pass. Where that is the output of a LayerNorm or of
a GELU, whose own inputs are kept as well, it can be made again in one pass over memory: a quarter
of a transformer block's kept bytes are outputs of its GELU, an eighth those of its norms.
:func:`torch.utils.checkpoint.checkpoint` would do the same, but takes 280 us of the host for each
call where this takes 36 (EPYC, Zen 4), and a training step has three dozen of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from gsalign.model.linear import linear

aten = torch.ops.aten


def linear_after_gelu(layer: nn.Linear, x: Tensor, *, again: bool) -> Tensor:
    """``layer(gelu(x))`` with the exact GELU.

    Args:
        layer: C to D.
        x: ``[..., C]``.
        again: make ``gelu(x)`` again in the backward pass instead of keeping it; the same numbers,
            and no second derivatives.

    Returns:
        ``[..., D]``.
    """
    if may_forget(again):
        return _LinearAfterGelu.apply(x, layer.weight, layer.bias)
    return linear(functional.gelu(x), layer.weight, layer.bias)


def linear_after_norm(layer: nn.Linear, norm: nn.LayerNorm, x: Tensor, *, again: bool) -> Tensor:
    """``layer(norm(x))``; arguments and result as those of :func:`linear_after_gelu`."""
    if may_forget(again):
        return _LinearAfterNorm.apply(x, norm.weight, norm.bias, norm.eps, layer.weight, layer.bias)
    return linear(norm(x), layer.weight, layer.bias)


def may_forget(again: bool) -> bool:
    """Whether these functions forget: if asked to, where PyTorch itself runs backward."""
    # A compiler chooses by itself what to make again.
    return again and torch.is_grad_enabled() and not torch.compiler.is_compiling()


class _LinearAfterGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear(functional.gelu(x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_made, *others = _linear_backward(
            grad, functional.gelu(x), weight, ctx.needs_input_grad
        )
        return None if grad_made is None else aten.gelu_backward(grad_made, x), *others


class _LinearAfterNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        eps: float,
        weight: Tensor,
        bias: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, shift, weight)
        ctx.eps = eps
        normalised = functional.layer_norm(x, scale.shape, scale, shift, eps)
        return linear(normalised, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, weight = ctx.saved_tensors
        normalised, mean, inverse = torch.native_layer_norm(x, scale.shape, scale, shift, ctx.eps)
        before, after = ctx.needs_input_grad[:3], ctx.needs_input_grad[4:]
        grad_made, *others = _linear_backward(grad, normalised, weight, (any(before), *after))
        grads: tuple[Tensor | None, ...] = (None, None, None)
        if grad_made is not None:
            grads = aten.native_layer_norm_backward(
                grad_made.to(x.dtype), x, scale.shape, mean, inverse, scale, shift, before
            )
        return *grads, None, *others


def _linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of ``linear``'s input, weight and bias, in the type autocast gave its output."""
    rows = grad.flatten(0, -2)
    return (
        linear(grad, weight.to(grad.dtype).t(), None) if wanted[0] else None,
        linear(rows.t(), x.to(grad.dtype).flatten(0, -2).t(), None) if wanted[1] else None,
        rows.sum(0) if wanted[2] else None,
    )
