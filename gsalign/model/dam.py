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


class DAM(nn.Module):
    """Dynamic alignment: distance to masked class prototypes, plus the entropy of the masks.

    With f the mean raw patch embedding of an image and g = f / |f|: m = mask(g), prototype =
    normalised(normalised(class mean of f) * m); loss = mean (g - prototype)^2 over batch and
    channels + ``entropy_weight`` * mean(-m log m). Class means are those of the batch.

    Where the network has body parts, every part of an identity is a class too, and its loss is
    added: f is then the unit mean patch of the part times the part's visibility; g ignores the
    length of f, while class means weigh each image by how much of the part it shows.

    Args:
        width: channels of a patch embedding.
        config: weight of the entropy.
    """

    def __init__(self, width: int, config: DamConfig) -> None:
        super().__init__()
        self.entropy_weight = config.entropy_weight
        self.mask = MaskGenerator(width)

    def forward(
        self, patches: Tensor, identities: Tensor, part_logits: Tensor | None = None
    ) -> Tensor:
        """The unweighted loss of a batch.

        Args:
            patches: ``[B, N, C]``, patch embeddings before the position embedding is added.
            identities: ``[B]`` int64.
            part_logits: ``[B, P + 1, N]`` of the masks of background and parts, or None.

        Returns:
            Scalar, float32 (float64 for float64 patches), whatever autocast says.
        """
        return self.loss(self.describe(patches, part_logits), identities)

    def describe(self, patches: Tensor, part_logits: Tensor | None = None) -> Tensor:
        """What the loss compares: f of the whole image and of its parts, ``[B, 1 + P, C]``.

        Float32 (float64 for float64 patches); arguments as those of :meth:`forward`.
        """
        whole = promote(patch_mean(patches)).unsqueeze(1)
        if part_logits is None:
            return whole
        pooled, visibility = gsalign_kernels.masked_part_pool(
            patches, part_logits, activation="softmax", background=True
        )
        unit = functional.normalize(promote(pooled), dim=2)
        return torch.cat([whole, unit * visibility.unsqueeze(2)], dim=1)

    def loss(self, features: Tensor, identities: Tensor) -> Tensor:
        """The unweighted loss of what :meth:`describe` gives, ``[B, 1 + P, C]``; a scalar."""
        whole = self.alignment(features[:, 0], identities)
        count = features.shape[1] - 1
        if not count:
            return whole
        part = torch.arange(count, device=identities.device)
        classes = identities.unsqueeze(1) * count + part
        return whole + self.alignment(features[:, 1:].flatten(0, 1), classes.flatten())

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
