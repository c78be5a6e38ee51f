"""Masked part pooling: part embeddings and part visibilities in one pass over the tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gsalign_kernels import backends, checks, registration
from gsalign_kernels.reference import pool as reference

MODES = ("weighted_mean", "mean", "max")
ACTIVATIONS = (None, "softmax", "sigmoid")


def masked_part_pool(
    tokens: Tensor,
    masks: Tensor,
    *,
    prefix: int = 0,
    mode: str = "weighted_mean",
    activation: str | None = None,
    eps: float = 1e-6,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Pools tokens under P masks, and tells how visible each part is.

    With weights ``m`` and map tokens ``x`` (those behind the prefix), part by part:
    ``weighted_mean`` is ``sum m x / max(sum m, eps)``, ``mean`` is ``sum m x / N``, ``max`` is the
    largest ``m x`` per channel. Sums are made in float32 (float64 for float64 tokens). All-zero
    masks give zeros. One part of weight 1 everywhere is plain average pooling, as the published
    network pools its patch embeddings. Gradients flow to tokens and masks.

    Args:
        tokens: ``[B, prefix + N, C]``.
        masks: ``[B, P, N]``, or ``[P, N]`` shared by the batch: weights, or logits when
            ``activation`` is given.
        prefix: number of tokens before the map, which are not pooled.
        mode: ``"weighted_mean"``, ``"mean"`` or ``"max"``.
        activation: None (masks are weights), ``"softmax"`` over the parts, or ``"sigmoid"``.
        eps: smallest sum of weights that is divided by.
        implementation: ``"reference"``, ``"cpp"``, or None for the choice in force.

    Returns:
        Pooled embeddings ``[B, P, C]`` in the type of ``tokens``, and visibilities ``[B, P]``,
        float32 (float64 for float64 tokens): each part's largest weight over the map.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: a shape, device, mode or activation is not as above, or ``eps`` not positive.
        KernelUnavailableError: the named implementation cannot run.
    """
    checks.check_tensor("tokens", tokens, ("B", "prefix + N", "C"))
    checks.check_choice("mode", mode, MODES)
    checks.check_choice("activation", activation, ACTIVATIONS)
    if not 0 <= prefix <= tokens.shape[1]:
        raise ValueError(
            f"prefix: wanted 0 to {tokens.shape[1]} (the number of tokens), got {prefix}"
        )
    if not eps > 0.0:
        raise ValueError(f"eps: wanted a positive number, got {eps}")
    positions = tokens.shape[1] - prefix
    shared = isinstance(masks, Tensor) and masks.dim() == 2
    shape = ("P", positions) if shared else (tokens.shape[0], "P", positions)
    checks.check_tensor("masks", masks, shape)
    checks.check_same_device(tokens=tokens, masks=masks)
    (masks,) = checks.converted(checks.coordinates_dtype(tokens), masks)
    chosen = backends.select("masked_part_pool", tokens.device, implementation)
    if chosen == "reference":
        return reference.masked_part_pool(tokens, masks, prefix, mode, activation, eps)
    pooled, visibility, *_ = registration.call(
        "masked_part_pool",
        chosen,
        tokens,
        masks,
        prefix,
        MODES.index(mode),
        ACTIVATIONS.index(activation),
        float(eps),
    )
    return pooled, visibility


def _fake(
    tokens: Tensor, masks: Tensor, prefix: int, mode: int, activation: int, eps: float
) -> Any:
    batch, _, channels = tokens.shape
    parts = masks.shape[-2]
    winners = (batch, parts, channels) if MODES[mode] == "max" else (0,)
    return (
        tokens.new_empty(batch, parts, channels),
        masks.new_empty(batch, parts),
        masks.new_empty(batch, parts),
        tokens.new_empty(batch, parts, dtype=torch.int32),
        tokens.new_empty(winners, dtype=torch.int32),
    )


def _backward_fake(
    grad_pooled: Tensor,
    grad_visibility: Tensor,
    tokens: Tensor,
    masks: Tensor,
    pooled: Tensor,
    totals: Tensor,
    peaks: Tensor,
    winners: Tensor,
    prefix: int,
    mode: int,
    activation: int,
    eps: float,
) -> Any:
    return (
        torch.empty_like(tokens, memory_format=torch.contiguous_format),
        torch.empty_like(masks, memory_format=torch.contiguous_format),
    )


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    pooled, _, totals, peaks, winners = output
    ctx.mark_non_differentiable(totals, peaks, winners)
    ctx.save_for_backward(inputs[0], inputs[1], pooled, totals, peaks, winners)
    ctx.settings = inputs[2:]


def _backward(call: Any, ctx: Any, grad_pooled: Tensor, grad_visibility: Tensor, *_: Any) -> Any:
    grads = call(grad_pooled, grad_visibility, *ctx.saved_tensors, *ctx.settings)
    return *grads, None, None, None, None


backends.declare("masked_part_pool", "cpp")
registration.register(
    "masked_part_pool",
    fake=_fake,
    fake_backward=_backward_fake,
    setup_context=_setup,
    backward=_backward,
    float32_arguments=(1,),
)
