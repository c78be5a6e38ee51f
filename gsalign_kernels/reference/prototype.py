"""Masked prototype alignment (DAM's loss) in plain PyTorch, without a loop over the labels."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from gsalign_kernels.reference.precision import without_autocast
from gsalign_kernels.reference.tps import computation_dtype

SMALLEST_MASK = 1e-6
SMALLEST_NORM = 1e-12


def class_means(features: Tensor, labels: Tensor) -> Tensor:
    """For each sample the mean of its class in the batch: ``[B, D], [B] -> [B, D]``.

    A ``[B, B]`` same-class matrix instead of one row per class: any label values, no host
    synchronisation, and shapes that do not depend on the labels.
    """
    same = (labels.unsqueeze(0) == labels.unsqueeze(1)).to(features.dtype)
    with without_autocast(features):
        return (same @ features) / same.sum(dim=1, keepdim=True)


def masked_prototype_loss(features: Tensor, masks: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared distance to the masked class prototypes, and the entropy term of the masks."""
    dtype = computation_dtype(features, masks)
    features, masks = features.to(dtype), masks.to(dtype)
    if features.numel() == 0:
        zero = features.sum() + masks.sum()
        return zero, zero
    unit = normalize(features, dim=1, eps=SMALLEST_NORM)
    centres = normalize(class_means(features, labels), dim=1, eps=SMALLEST_NORM)
    prototypes = normalize(centres * masks, dim=1, eps=SMALLEST_NORM)
    alignment = (unit - prototypes).square().mean()
    entropy = -(masks * masks.clamp(min=SMALLEST_MASK).log()).mean()
    return alignment, entropy
