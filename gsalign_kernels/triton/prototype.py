"""Masked prototype loss in Triton: ``gsalign_triton::masked_prototype_loss`` and its backward."""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gsalign_kernels.triton.launch import (
    ceil_div,
    check_available,
    check_like,
    checked_grid,
    device_of,
    power_of_two,
)

KEPT = 4
"""Scalars of a row that the forward pass keeps; see ``csrc/prototype/prototype.h``."""

MAX_SAMPLES = 1 << 30
"""As in the CUDA kernels: an index past the last window must not overflow."""


@lru_cache(maxsize=1)
def _kernels() -> Any:
    return importlib.import_module("gsalign_kernels.triton.prototype_kernels")


def _blocks(batch: int, channels: int) -> dict[str, int]:
    """Labels, members and channels that a program of a class works on at a time."""
    return {
        "BLOCK_B": power_of_two(batch, 16, 256),
        "BLOCK_K": power_of_two(batch, 2, 4),
        "BLOCK_C": power_of_two(channels, 16, 128),
    }


def _check(features: Tensor, masks: Tensor, labels: Tensor) -> None:
    check_available("masked_prototype_loss", features)
    if features.dim() != 2 or features.shape[0] > MAX_SAMPLES:
        raise ValueError(
            f"features: wanted [B, D] with B of at most {MAX_SAMPLES}, got {tuple(features.shape)}"
        )
    rows = tuple(features.shape)
    for name, tensor in (("features", features), ("masks", masks)):
        check_like(name, tensor, rows, features.new_empty(0, dtype=torch.float32))
    check_like("labels", labels, rows[:1], features.new_empty(0, dtype=torch.int64))


@torch.library.custom_op(
    "gsalign_triton::masked_prototype_loss",
    mutates_args=(),
    schema="(Tensor features, Tensor masks, Tensor labels)"
    " -> (Tensor alignment, Tensor entropy, Tensor means, Tensor norms)",
)
def masked_prototype_loss(
    features: Tensor, masks: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forward pass; arguments as :func:`gsalign_kernels.masked_prototype_loss`, checked again.

    Returns:
        alignment, entropy: the losses, scalars.
        means: ``[B, D]``, each sample's class mean, for the backward pass.
        norms: ``[B, 4]``, per sample ``|f|``, ``|q|``, ``f q`` and ``|mean|``, for the same.
    """
    _check(features, masks, labels)
    features, masks, labels = (t.contiguous() for t in (features, masks, labels))
    batch, channels = features.shape
    means = torch.empty_like(features)
    if batch == 0 or channels == 0:
        zeros = (features.new_zeros(shape) for shape in ((), (), (batch, KEPT)))
        alignment, entropy, norms = zeros
        return alignment, entropy, means, norms
    alignment, entropy = features.new_empty(()), features.new_empty(())
    norms, shares = features.new_empty((batch, KEPT)), features.new_empty((batch, 2))
    arrived = labels.new_empty((1,), dtype=torch.int32)
    block = _blocks(batch, channels)
    tiles = ceil_div(channels, block["BLOCK_C"])
    kernels = _kernels()
    with device_of(features):
        kernels.means_kernel[checked_grid("masked_prototype_loss", batch * tiles)](
            features,
            labels,
            means,
            arrived,
            batch,
            channels,
            tiles,
            **block,
            num_warps=2,
        )
        kernels.rows_kernel[checked_grid("masked_prototype_loss", batch)](
            features,
            masks,
            means,
            norms,
            shares,
            arrived,
            alignment,
            entropy,
            float(batch * channels),
            batch,
            channels,
            BLOCK_C=power_of_two(channels, 16, 1024),
            BLOCK_B=block["BLOCK_B"],
            num_warps=4,
        )
    return alignment, entropy, means, norms


@torch.library.custom_op(
    "gsalign_triton::masked_prototype_loss_backward",
    mutates_args=(),
    schema="(Tensor grad_alignment, Tensor grad_entropy, Tensor features, Tensor masks,"
    " Tensor labels, Tensor means, Tensor norms) -> (Tensor, Tensor)",
)
def masked_prototype_loss_backward(
    grad_alignment: Tensor,
    grad_entropy: Tensor,
    features: Tensor,
    masks: Tensor,
    labels: Tensor,
    means: Tensor,
    norms: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of features and masks; the same bits on every run."""
    _check(features, masks, labels)
    batch, channels = features.shape
    check_like("grad_alignment", grad_alignment, (), features)
    check_like("grad_entropy", grad_entropy, (), features)
    check_like("means", means, (batch, channels), features)
    check_like("norms", norms, (batch, KEPT), features)
    features, masks, labels, means, norms = (
        t.contiguous() for t in (features, masks, labels, means, norms)
    )
    grad_features, grad_masks = torch.empty_like(features), torch.empty_like(masks)
    if batch == 0 or channels == 0:
        return grad_features, grad_masks
    block = _blocks(batch, channels)
    tiles = ceil_div(channels, block["BLOCK_C"])
    with device_of(features):
        _kernels().backward_kernel[checked_grid("masked_prototype_loss", batch * tiles)](
            features,
            masks,
            labels,
            means,
            norms,
            grad_alignment,
            grad_entropy,
            grad_features,
            grad_masks,
            float(batch * channels),
            batch,
            channels,
            tiles,
            **block,
            num_warps=2,
        )
    return grad_features, grad_masks
