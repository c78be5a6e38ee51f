"""The loss terms, unweighted: float32 under autocast, static shapes, no host synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from gsalign.model.precision import promote


def classification(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy without smoothing, averaged over the samples whose loss is not zero.

    Args:
        logits: ``[B, N]``.
        labels: ``[B]`` int64 in [0, N).

    Returns:
        Scalar; 0 when every sample's loss is exactly 0.

    Source: published code, for identities and for views alike.
    """
    per_sample = functional.cross_entropy(promote(logits), labels, reduction="none")
    return per_sample.sum() / (per_sample != 0).sum().clamp(min=1)


def batch_hard_triplet(features: Tensor, identities: Tensor) -> Tensor:
    """Soft-margin triplet loss on the hardest pairs of the batch: mean log(1 + exp(d_ap - d_an)).

    Args:
        features: ``[B, C]``, not normalised; distances are Euclidean.
        identities: ``[B]`` int64.

    Returns:
        Scalar. The anchor counts among its own positives, so an identity with a single image has
        d_ap = 0; an anchor without negatives adds 0.

    Source: published code; batch-hard mining after Hermans et al., arXiv 1703.07737.
    """
    features = promote(features)
    # Distances do not see a common shift, and the expanded square cancels less without one.
    features = features - features.mean(dim=0).detach()
    squared_norm = features.square().sum(dim=1)
    squared = squared_norm.unsqueeze(1) + squared_norm.unsqueeze(0) - 2 * features @ features.T
    itself = torch.eye(features.shape[0], dtype=torch.bool, device=features.device)
    distance = squared.masked_fill(itself, 0).clamp(min=1e-12).sqrt()

    same = identities.unsqueeze(1) == identities.unsqueeze(0)
    hardest_positive = distance.masked_fill(~same, 0).max(dim=1).values
    hardest_negative = distance.masked_fill(same, torch.inf).min(dim=1).values
    return functional.softplus(hardest_positive - hardest_negative).mean()


def orthogonality(feature: Tensor, view_feature: Tensor) -> Tensor:
    """Mean absolute cosine between identity and view features: ``[B, C], [B, C] -> scalar``."""
    return functional.cosine_similarity(promote(feature), promote(view_feature)).abs().mean()


def deformation(angles: Tensor) -> Tensor:
    """Sum over layers of the mean absolute angle: ``[L, B]`` radians ``-> scalar``; 0 for L = 0."""
    return angles.abs().mean(dim=1).sum()
