"""Attention roll-out: which patches the class and the view token have their content from.

Abnar and Zuidema, "Quantifying Attention Flow in Transformers" (ACL 2020), section 3: every layer
mixes tokens, half by attention and half by what its residual connection carries on, and the
product of all layers' mixings says what share of a token at the end comes from which token at the
beginning. Here a layer's warp is a mixing too, in front of its attention.

Where a layer subtracts the view token from the class token, the roll-out leaves both as they are:
it counts where content comes from, and the subtraction changes its sign.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, cast

import torch
from torch import Tensor

from gsalign.model import FeatureOutput, GSAlign
from gsalign.model.ltps import LTPS, PREFIX
from gsalign.model.precision import promote
from gsalign.model.vit import attended_from
from gsalign.visualize.looking import evaluating

Heads = Literal["mean", "max"]
HEADS: tuple[Heads, ...] = ("mean", "max")
RESIDUAL = 0.5


def attention_rollout(
    network: GSAlign, images: Tensor, *, heads: Heads = "mean", residual: float = RESIDUAL
) -> Tensor:
    """Shares of the tokens before the first layer in the tokens after the last.

    Args:
        network: its mode is kept; it looks in evaluation mode.
        images: ``[B, 3, H, W]``, normalised, on the network's device.
        heads: how the heads of a layer become one: ``"mean"``, or ``"max"``, the largest weight
            of any head.
        residual: share of a layer that its residual connection carries on, 0 to 1.

    Returns:
        ``[B, 2 + N, 2 + N]``, float32 or float64, no gradient. Row 0 is the class token, row 1
        the view token; columns 2 to the end are the patches, row by row, of the image as the
        network turns it. Rows sum to 1.

    Raises:
        ValueError: the images have another size than the network, or ``heads`` or ``residual`` is
            none of these.
    """
    with evaluating(network), attention_inputs(network) as inputs:
        output = network.forward_features(images)
    return roll_out(network, inputs, output, heads=heads, residual=residual)


@contextmanager
def attention_inputs(network: GSAlign) -> Iterator[list[Tensor]]:
    """A block in which a forward pass leaves what its layers' attention gets, in order.

    PyTorch's fused attention never holds the weights; from its input they can be made again. The
    blocks' first norms give it as they are called as modules, which they are where nothing is
    differentiated.

    Yields:
        A list that becomes ``[B, 2 + N, C]`` of every layer.
    """
    inputs: list[Tensor] = []

    def keep(module: object, arguments: object, normalised: Tensor) -> None:
        inputs.append(normalised)

    hooks = [
        cast(torch.nn.Module, block.norm1).register_forward_hook(keep)
        for block in network.backbone.blocks
    ]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def roll_out(
    network: GSAlign,
    inputs: Sequence[Tensor],
    output: FeatureOutput,
    *,
    heads: Heads = "mean",
    residual: float = RESIDUAL,
) -> Tensor:
    """The roll-out of a forward pass that :func:`attention_inputs` has watched.

    Args:
        network: which ran.
        inputs: what its layers' attention got.
        output: what it gave.
        heads: as in :func:`attention_rollout`, and so is the rest.
        residual: likewise.
    """
    layers = list(network.backbone.ltps)
    offsets = [None] * len(layers) if output.offsets is None else output.offsets
    warps = dict(zip(layers, zip(output.angles, offsets, strict=True), strict=True))
    flow: Tensor | None = None
    with torch.no_grad():
        for layer, (block, tokens) in enumerate(zip(network.backbone.blocks, inputs, strict=True)):
            weights = promote(attended_from(block.attn, tokens))
            mixing = layer_mixing(weights, heads=heads, residual=residual)
            if str(layer) in warps:
                ltps = cast(LTPS, network.backbone.ltps[str(layer)])
                mixing = mixing @ warp_mixing(ltps, *warps[str(layer)]).to(mixing.dtype)
            flow = mixing if flow is None else mixing @ flow
    assert flow is not None
    return flow


def layer_mixing(weights: Tensor, *, heads: Heads = "mean", residual: float = RESIDUAL) -> Tensor:
    """One layer's mixing of tokens: ``[B, heads, T, T] -> [B, T, T]``; rows sum to 1.

    Raises:
        ValueError: ``heads`` or ``residual`` is none of those of :func:`attention_rollout`.
    """
    if heads not in HEADS:
        raise ValueError(f"heads is {heads!r}; wanted one of {', '.join(HEADS)}")
    if not 0.0 <= residual <= 1.0:
        raise ValueError(f"residual is {residual:g}; wanted a share from 0 to 1")
    joined = weights.mean(dim=1) if heads == "mean" else weights.amax(dim=1)
    attended = joined / joined.sum(dim=-1, keepdim=True)
    carried = torch.eye(attended.shape[-1], dtype=attended.dtype, device=attended.device)
    return residual * carried + (1.0 - residual) * attended


def warp_mixing(ltps: LTPS, angle: Tensor, offsets: Tensor | None = None) -> Tensor:
    """A warp's mixing of tokens: ``[B]`` radians ``-> [B, T, T]``; rows sum to 1.

    Control points are moved by ``[B, K, 2]``, where the images have points of their own.

    ``x + eta * warped(x)`` is linear in x; applied to unit vectors it gives its own matrix. Class
    and view tokens pass as they are.
    """
    count = PREFIX + ltps.size[0] * ltps.size[1]
    unit = torch.eye(count, dtype=ltps.basis.dtype, device=ltps.basis.device)
    batch = unit.repeat(angle.shape[0], 1, 1)
    # eta may be negative; what is read counts, whatever its sign.
    shares = unit + (ltps.warp(batch, angle, offsets) - unit).abs()
    return shares / shares.sum(dim=-1, keepdim=True)


def maps_of(flow: Tensor, size: tuple[int, int]) -> Tensor:
    """The patches' shares in class and view token: ``[B, T, T] -> [B, 2, rows, columns]``.

    Each map sums to 1: what the tokens have from themselves and from each other is left out.
    """
    shares = flow[:, :PREFIX, PREFIX:]
    return (shares / shares.sum(dim=-1, keepdim=True)).unflatten(2, size)
