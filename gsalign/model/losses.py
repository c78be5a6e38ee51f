"""The loss terms, unweighted: float32 under autocast, static shapes, no host synchronisation."""

from __future__ import annotations

import math

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


def weighted_classification(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy of several views of every sample, averaged with weights.

    Args:
        logits: ``[B, P, N]``.
        labels: ``[B]`` int64 in [0, N), the same for all P.
        weights: ``[B, P]``, not negative.

    Returns:
        Scalar; 0 when all weights are.
    """
    batch, parts, _ = logits.shape
    repeated = labels.unsqueeze(1).expand(batch, parts).flatten()
    per_sample = functional.cross_entropy(promote(logits).flatten(0, 1), repeated, reduction="none")
    total = weights.sum()
    weighted = (per_sample * weights.flatten()).sum()
    return weighted / torch.where(total > 0, total, 1.0)


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


def deformation(angles: Tensor, hinge: float = 0.0) -> Tensor:
    """Sum over layers of the mean absolute angle: ``[L, B]`` radians ``-> scalar``; 0 for L = 0.

    Args:
        angles: ``[L, B]``, radians.
        hinge: radians; of every angle only what exceeds it counts. 0 as published.
    """
    size = angles.abs()
    if hinge:
        size = (size - hinge).relu()
    return size.mean(dim=1).sum()


def part_collapse(logits: Tensor) -> Tensor:
    """What keeps the parts apart: 0 when every patch is one part's and all parts are as large.

    The mean entropy of the masks over log(P + 1), plus what the entropy of the parts' shares of
    the image lacks to log(P), over log(P). The two together are an information about which part a
    patch belongs to: masks that are the same everywhere cost 1, whatever they are, so there is
    nothing to gain from one part taking everything, as with the first term alone. By image, since
    masks that share the images among them, not each image, would be no parts. The background
    may have any share.

    Args:
        logits: ``[B, P + 1, N]``, channel 0 the background.

    Returns:
        Scalar in [0, 2].
    """
    channels = logits.shape[1]
    log_masks = promote(logits).log_softmax(dim=1)
    undecided = -(log_masks.exp() * log_masks).sum(dim=1).mean() / math.log(channels)
    log_shares = log_masks[:, 1:].logsumexp(dim=2).log_softmax(dim=1)
    if channels == 2:  # one part has nobody to share with
        return undecided
    spread = -(log_shares.exp() * log_shares).sum(dim=1).mean()
    return undecided + 1.0 - spread / math.log(channels - 1)


def part_label_costs(logits: Tensor, labels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cross-entropy of every image's part masks with its label map, for :func:`part_labels`.

    The truth of a cell is the share of its known pixels that each part has, and so is the best
    mask: a cell on an outline is its parts' in these shares.

    Args:
        logits: ``[B, P + 1, M]`` of the masks, channel 0 the background.
        labels: uint8 ``[B, H, W]``: 0 background, 1 .. P the parts; above P unknown.
        grid: rows and columns of the masks, which divide (H, W); their product is M.

    Returns:
        ``[B, 2]``: the sum over the image's known pixels, and their number; by pixels of a cell.
    """
    rows, columns = grid
    cells = labels.unflatten(2, (columns, -1)).unflatten(1, (rows, -1)).transpose(2, 3).flatten(3)
    log_masks = promote(logits).log_softmax(dim=1)
    shares = torch.stack(
        [
            (cells == part).to(log_masks.dtype).mean(dim=3).flatten(1)
            for part in range(logits.shape[1])
        ],
        dim=1,
    )
    return torch.stack([-(shares * log_masks).sum(dim=(1, 2)), shares.sum(dim=(1, 2))], dim=1)


def part_labels(costs: Tensor) -> Tensor:
    """Mean over the known pixels of all images, so that an image counts by what is known of it.

    Args:
        costs: ``[B, 2]`` of :func:`part_label_costs`.

    Returns:
        Scalar; 0 when no pixel is known.
    """
    cost, known = costs.sum(dim=0).unbind()
    return cost / torch.where(known > 0, known, 1.0)
