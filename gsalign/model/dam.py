"""DAM: channel masks that pull every image towards the masked prototype of its identity."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

import gsalign_kernels
from gsalign.model.config import DamConfig
from gsalign.model.precision import promote, without_autocast


def patch_mean(patches: Tensor) -> Tensor:
    """Mean over the map: ``[B, N, C] -> [B, C]``."""
    everywhere = patches.new_ones(1, patches.shape[1])
    pooled, _ = gsalign_kernels.masked_part_pool(patches, everywhere, mode="mean")
    return pooled.squeeze(1)


class MaskGenerator(nn.Module):
    """A mask over the channels from a normalised feature: FC, LayerNorm, ReLU, FC, sigmoid.

    The linear layers start from a normal distribution of deviation 0.02 with zero bias, as in the
    published code, so the masks start near 1/2.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.out = nn.Linear(width, width)
        for linear in (self.hidden, self.out):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, feature: Tensor) -> Tensor:
        """``[B, D] -> [B, D]``, each value in (0, 1)."""
        return self.out(self.norm(self.hidden(feature)).relu()).sigmoid()


class PartMasks(nn.Module):
    """Spatial masks of a few parts, from a linear map of the raw patch embeddings.

    At every patch the masks are a softmax over the parts. An extension beyond the published code,
    whose masks are over channels only.

    Args:
        width: channels of a patch embedding.
        parts: number of parts.
    """

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.logits = nn.Linear(width, parts)
        nn.init.trunc_normal_(self.logits.weight, std=0.02)
        nn.init.zeros_(self.logits.bias)

    def masks(self, patches: Tensor) -> Tensor:
        """``[B, N, C] -> [B, parts, N]``, summing to 1 over the parts; for pictures."""
        return promote(self.logits(patches)).softmax(dim=2).transpose(1, 2)

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Mean patch of every part, and how visible the part is.

        Args:
            patches: ``[B, N, C]`` raw patch embeddings.

        Returns:
            ``[B, parts, C]`` means weighted by the masks, and ``[B, parts]`` visibilities, the
            largest weight of the part anywhere on the map.
        """
        logits = promote(self.logits(patches)).transpose(1, 2)
        return gsalign_kernels.masked_part_pool(patches, logits, activation="softmax")


class DAM(nn.Module):
    """Dynamic alignment: distance to masked class prototypes, plus the entropy of the masks.

    With f the mean raw patch embedding of an image and g = f / |f|: m = mask(g), prototype =
    normalised(normalised(class mean of f) * m); loss = mean (g - prototype)^2 over batch and
    channels + ``entropy_weight`` * mean(-m log m). Class means are those of the batch.

    With more than one part, f is the unit mean patch of a part times the part's visibility, and
    every part of an identity is a class: g ignores the length of f, while class means weigh each
    image by how much of the part it shows.

    Args:
        width: channels of a patch embedding.
        config: number of parts and weight of the entropy.
    """

    def __init__(self, width: int, config: DamConfig) -> None:
        super().__init__()
        self.entropy_weight = config.entropy_weight
        self.mask = MaskGenerator(width)
        self.parts = PartMasks(width, config.parts) if config.parts > 1 else None

    def forward(self, patches: Tensor, identities: Tensor) -> Tensor:
        """The unweighted loss of a batch.

        Args:
            patches: ``[B, N, C]``, patch embeddings before the position embedding is added.
            identities: ``[B]`` int64.

        Returns:
            Scalar, float32 (float64 for float64 patches), whatever autocast says.
        """
        if self.parts is None:
            return self.alignment(patch_mean(patches), identities)
        pooled, visibility = self.parts(patches)
        count = pooled.shape[1]
        features = functional.normalize(promote(pooled), dim=2) * visibility.unsqueeze(2)
        part = torch.arange(count, device=identities.device)
        classes = identities.unsqueeze(1) * count + part
        return self.alignment(features.flatten(0, 1), classes.flatten())

    def alignment(self, features: Tensor, classes: Tensor) -> Tensor:
        """The unweighted loss of features ``[M, C]`` of classes ``[M]`` int64; a scalar."""
        with without_autocast(features):
            features = promote(features)
            unit = functional.normalize(features, dim=1)
            masks = self.mask(unit.to(self.mask.hidden.weight.dtype))
            alignment, entropy = gsalign_kernels.masked_prototype_loss(
                features, promote(masks), classes
            )
            return alignment + self.entropy_weight * entropy
