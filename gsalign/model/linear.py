"""Linear layers and attention, by the fastest of PyTorch's own ways on a CPU.

PyTorch hands float32 products on a CPU to MKL, which leaves a quarter of an AMD processor's
arithmetic unused; oneDNN, which it also brings and uses for convolutions and half types, does not,
and takes GELU along. Everywhere else (GPUs, half types, compiled, traced, exported or transformed
programs, ``--kernels reference``) these are the plain functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gsalign.model.precision import without_autocast
from gsalign_kernels import backends, transforms


def _has_onednn(*operators: str) -> bool:
    """Whether this PyTorch has oneDNN and these operators of it, which are private."""
    there = torch.backends.mkldnn.is_available()
    return there and all(hasattr(torch.ops.mkldnn, name) for name in operators)


_HAS_ONEDNN = _has_onednn("_linear_pointwise")
# On a processor without instructions for it, as AVX-512, PyTorch lays no bfloat16 weights out.
_KEEPS_BFLOAT16 = (
    _has_onednn("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
    and torch.ops.mkldnn._is_mkldnn_bf16_supported()
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
        tokens.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and _reaches_onednn(tokens, weight)
    )


def _reaches_onednn(tokens: Tensor, weight: Tensor) -> bool:
    return (
        _HAS_ONEDNN
        and tokens.device.type == weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and plain_program()
        and type(tokens) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and tokens.numel() > 0
        and bool(torch.backends.mkldnn.enabled)
        and backends.choice_in_force() != "reference"
    )


# Per weight: itself, how often it was written, and what was made of it for bfloat16 products.
_Kept = dict[int, tuple[Tensor, int, Tensor]]
_kept: ContextVar[_Kept | None] = ContextVar("kept weights", default=None)


@contextmanager
def keeping_weights() -> Iterator[None]:
    """A block in which weights under bfloat16 autocast on a CPU are converted and laid out once.

    For many batches through one network: autocast converts every weight anew each time it is
    entered, and oneDNN lays it out anew at every product. Costs two bytes per weight until the
    block ends; does nothing where oneDNN has no bfloat16. A weight written to in between is made
    anew, unless through ``.data``, which leaves no trace; load weights before the block, not in
    it.
    """
    outer = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(outer)


def _kept_bfloat16(tokens: Tensor, weight: Tensor) -> Tensor | None:
    """The weight for a product in bfloat16, where this block keeps it; else None."""
    if not _KEEPS_BFLOAT16 or torch.is_grad_enabled() or not _reaches_onednn(tokens, weight):
        return None
    kept = _kept.get()
    if (
        kept is None
        or not isinstance(weight, nn.Parameter)
        or not torch.is_autocast_enabled("cpu")
        or torch.get_autocast_dtype("cpu") != torch.bfloat16
        or tokens.dtype not in (torch.float32, torch.bfloat16)
    ):
        return None
    writes = 0 if weight.is_inference() else weight._version
    found = kept.get(id(weight))
    if found is None or found[1] != writes:
        laid_out = torch.ops.mkldnn._reorder_linear_weight(weight.detach().bfloat16(), None)
        found = kept[id(weight)] = (weight, writes, laid_out)
    return found[2]


def _onednn(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none"
) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(tokens, weight, bias, activation, [], "none")


def _onednn_bfloat16(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none"
) -> Tensor:
    with without_autocast(tokens):
        bias = None if bias is None else bias.bfloat16()
        return _onednn(tokens.bfloat16(), weight, bias, activation)


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
    kept = _kept_bfloat16(tokens, weight)
    if kept is not None:
        return _onednn_bfloat16(tokens, kept, bias)
    if not _served_by_onednn(tokens, weight):
        return functional.linear(tokens, weight, bias)
    if torch.is_grad_enabled():
        return _Linear.apply(tokens, weight, bias)  # type: ignore[no-untyped-call]
    return _onednn(tokens, weight, bias)


def linear_gelu(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The exact GELU of :func:`linear`, in one pass where nothing is to be differentiated."""
    kept = _kept_bfloat16(tokens, weight)
    if kept is not None:
        return _onednn_bfloat16(tokens, kept, bias, "gelu")
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
        return attention_weights(query, key) @ value


def attention_weights(query: Tensor, key: Tensor) -> Tensor:
    """Of queries over keys, ``[B, h, N, c], [B, h, M, c] -> [B, h, N, M]``; rows sum to 1."""
    weights = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    return weights.softmax(dim=-1)
