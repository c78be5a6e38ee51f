"""Masked part pooling: part embeddings and part visibilities in one pass over the tokens."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gsalign_kernels import backends, checks, registration
from gsalign_kernels.reference import pool as reference

MODES = ("weighted_mean", "mean", "max")
ACTIVATIONS = (None, "softmax", "sigmoid")
VISIBILITIES = ("continuous", "binary")


def masked_part_pool(
    tokens: Tensor,
    masks: Tensor,
    *,
    prefix: int = 0,
    mode: str = "weighted_mean",
    activation: str | None = None,
    background: bool = False,
    visibility: str = "continuous",
    eps: float = 1e-6,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Pools tokens under P masks, and tells how visible each part is.

    With weights ``m`` and map tokens ``x`` (those behind the prefix), part by part:
    ``weighted_mean`` is ``sum m x / max(sum m, eps)``, ``mean`` is ``sum m x / N``, ``max`` is the
    largest ``m x`` per channel. Sums are made in float32 (float64 for float64 tokens). All-zero
    masks give zeros. One part of weight 1 everywhere is plain average pooling, as the published
    network pools its patch embeddings; :func:`stripe_masks` makes horizontal stripes. Gradients
    flow to tokens and masks.

    Args:
        tokens: ``[B, prefix + N, C]``.
        masks: ``[B, P, N]``, or ``[P, N]`` shared by the batch: weights, or logits when
            ``activation`` is given. With ``background`` P + 1 channels instead of P.
        prefix: number of tokens before the map, which are not pooled.
        mode: ``"weighted_mean"``, ``"mean"`` or ``"max"``.
        activation: None (masks are weights), ``"softmax"`` over the channels of the masks, or
            ``"sigmoid"``.
        background: whether channel 0 of the masks is the background: it takes its share of the
            softmax and competes for binary visibility, and is not pooled.
        visibility: ``"continuous"``, a part's largest weight over the map; or ``"binary"``, 1 where
            the part has the largest weight of all channels at one position at least, and that
            weight is positive (of equal weights the first channel's counts), else 0. Binary
            visibilities have no gradient.
        eps: smallest sum of weights that is divided by.
        implementation: ``"reference"``, ``"cpp"``, ``"cuda"`` (at most 512 parts), ``"triton"``, or
            None for the choice in force.

    Returns:
        Pooled embeddings ``[B, P, C]`` in the type of ``tokens``, and visibilities ``[B, P]``,
        float32 (float64 for float64 tokens), as ``visibility`` says; 0 on a map of no positions.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: a shape, device or choice is not as above, there is no channel for the
            background, or ``eps`` is not positive.
        KernelUnavailableError: the named implementation cannot run.
    """
    checks.check_tensor("tokens", tokens, ("B", "prefix + N", "C"))
    checks.check_choice("mode", mode, MODES)
    checks.check_choice("activation", activation, ACTIVATIONS)
    checks.check_choice("visibility", visibility, VISIBILITIES)
    if not 0 <= prefix <= tokens.shape[1]:
        raise ValueError(
            f"prefix: wanted 0 to {tokens.shape[1]} (the number of tokens), got {prefix}"
        )
    if not eps > 0.0:
        raise ValueError(f"eps: wanted a positive number, got {eps}")
    positions = tokens.shape[1] - prefix
    shared = isinstance(masks, Tensor) and masks.dim() == 2
    channels = "P + 1" if background else "P"
    shape = (channels, positions) if shared else (tokens.shape[0], channels, positions)
    checks.check_tensor("masks", masks, shape)
    if background and masks.shape[-2] < 1:
        raise ValueError(
            "masks: wanted a channel of background before the parts, got none; "
            "pass background=False or add the channel"
        )
    checks.check_same_device(tokens=tokens, masks=masks)
    (masks,) = checks.converted(checks.coordinates_dtype(tokens), masks)
    chosen = backends.select("masked_part_pool", tokens.device, implementation, tokens.dtype)
    if chosen == "reference":
        return reference.masked_part_pool(
            tokens, masks, prefix, mode, activation, background, visibility, eps
        )
    pooled, seen, *_ = registration.call(
        "masked_part_pool",
        chosen,
        tokens,
        masks,
        prefix,
        MODES.index(mode),
        ACTIVATIONS.index(activation),
        background,
        VISIBILITIES.index(visibility),
        float(eps),
    )
    return pooled, seen


def stripe_masks(
    size: tuple[int, int],
    parts: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Shared masks that cut a map into horizontal stripes, for :func:`masked_part_pool`.

    Part i has weight 1 on the rows from ``round(i H / parts)`` up to ``round((i + 1) H / parts)``
    (halves round to the even row), 0 elsewhere. Where ``parts`` exceeds H some stripes are empty.

    Args:
        size: (H, W) of the map.
        parts: number of stripes.
        device: where to make them.
        dtype: a floating-point type.

    Returns:
        ``[parts, H * W]``, positions in row-major order.

    Raises:
        TypeError: ``size`` is no pair of integers.
        ValueError: a length or ``parts`` is below 1.
    """
    height, width = checks.check_size("size", size)
    if parts < 1:
        raise ValueError(f"parts: wanted at least 1, got {parts}")
    masks = torch.zeros(parts, height, width, device=device, dtype=dtype)
    edges = [round(Fraction(i * height, parts)) for i in range(parts + 1)]
    for part, (first, end) in enumerate(pairwise(edges)):
        masks[part, first:end] = 1.0
    return masks.flatten(1)


def _fake(
    tokens: Tensor,
    masks: Tensor,
    prefix: int,
    mode: int,
    activation: int,
    background: bool,
    visibility: int,
    eps: float,
) -> Any:
    batch, _, channels = tokens.shape
    parts = masks.shape[-2] - int(background)
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
    totals: Tensor,
    peaks: Tensor,
    winners: Tensor,
    prefix: int,
    mode: int,
    activation: int,
    background: bool,
    eps: float,
) -> Any:
    return (
        torch.empty_like(tokens, memory_format=torch.contiguous_format),
        torch.empty_like(masks, memory_format=torch.contiguous_format),
    )


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, seen, totals, peaks, winners = output
    tokens, masks, prefix, mode, activation, background, visibility, eps = inputs
    binary = VISIBILITIES[visibility] == "binary"
    ctx.mark_non_differentiable(totals, peaks, winners, *([seen] if binary else []))
    ctx.save_for_backward(tokens, masks, totals, peaks, winners)
    ctx.settings = (prefix, mode, activation, background, eps)


def _backward(call: Any, ctx: Any, grad_pooled: Tensor, grad_visibility: Tensor, *_: Any) -> Any:
    grads = call(grad_pooled, grad_visibility, *ctx.saved_tensors, *ctx.settings)
    return *grads, None, None, None, None, None, None


registration.define_triton("pool")

# The Triton kernels have not been timed on a GPU. Compiled with Triton 3.6 and 3.8 they are alike.
backends.declare(
    "masked_part_pool",
    "cpp",
    "cuda",
    "triton",
    without_float64=("cuda", "triton"),
    only_by_name=("triton",),
    least_triton=(3, 6),
)
registration.register(
    "masked_part_pool",
    fake=_fake,
    fake_backward=_backward_fake,
    setup_context=_setup,
    backward=_backward,
    float32_arguments=(1,),
)
