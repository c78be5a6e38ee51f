"""Masked part pooling in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from gsalign_kernels.reference.precision import without_autocast
from gsalign_kernels.reference.tps import computation_dtype


def part_weights(masks: Tensor, activation: str | None) -> Tensor:
    """Masks ``[..., P, N]`` as given, or made from logits: softmax over the parts, or sigmoid."""
    if activation == "softmax":
        return masks.softmax(dim=-2)
    if activation == "sigmoid":
        return masks.sigmoid()
    return masks


def part_visibility(weights: Tensor, background: bool, visibility: str) -> Tensor:
    """Visibility of each part from the weights of all channels: ``[..., P, N] -> [..., P]``.

    ``continuous`` is a part's largest weight, ``binary`` whether it has the largest positive one
    of all channels somewhere. A map of no positions shows nothing: visibility 0.
    """
    parts = weights[..., int(background) :, :]
    if weights.shape[-1] == 0:
        return parts.sum(dim=-1)
    if visibility == "continuous":
        return parts.max(dim=-1).values
    channel = torch.arange(weights.shape[-2], device=weights.device).unsqueeze(1)
    leads = (weights.argmax(dim=-2, keepdim=True) == channel) & (weights > 0)
    return leads[..., int(background) :, :].any(dim=-1).to(weights.dtype)


def masked_part_pool(
    tokens: Tensor,
    masks: Tensor,
    prefix: int,
    mode: str,
    activation: str | None,
    background: bool,
    visibility: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Pooled ``[B, P, C]`` and visibility ``[B, P]`` of the tokens behind the prefix.

    A map of no positions pools to zeros in every mode, and still has (empty) gradients.
    """
    dtype = computation_dtype(tokens, masks)
    body = tokens[:, prefix:].to(dtype)
    weights = part_weights(masks.to(dtype), activation)
    weights = weights.expand(tokens.shape[0], -1, -1)
    seen = part_visibility(weights, background, visibility)
    weights = weights[:, int(background) :]
    positions = body.shape[1]
    if mode == "max" and positions > 0:
        pooled = (weights.unsqueeze(-1) * body.unsqueeze(1)).max(dim=2).values
    else:
        with without_autocast(body):
            pooled = weights @ body
        if mode == "weighted_mean":
            pooled = pooled / weights.sum(dim=-1, keepdim=True).clamp(min=eps)
        elif mode == "mean":
            pooled = pooled / max(positions, 1)
    return pooled.to(tokens.dtype), seen
