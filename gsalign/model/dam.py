"""DAM: channel masks that pull every image towards the masked prototype of its identity."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

import gsalign_kernels
from gsalign.model.config import DamConfig
from gsalign.model.precision import promote, without_autocast


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
    """

    def __init__(self, width: int, config: DamConfig) -> None:
        super().__init__()
        self.entropy_weight = config.entropy_weight
        self.mask = MaskGenerator(width)

    def forward(self, patch_mean: Tensor, identities: Tensor) -> Tensor:
        """The unweighted loss.

        Args:
            patch_mean: ``[B, D]``, mean over the map of the patch embeddings before the position
                embedding is added.
            identities: ``[B]`` int64.

        Returns:
            Scalar, float32 (float64 for float64 features), whatever autocast says.
        """
        with without_autocast(patch_mean):
            feature = promote(patch_mean)
            unit = functional.normalize(feature, dim=1)
            masks = self.mask(unit.to(self.mask.hidden.weight.dtype))
            alignment, entropy = gsalign_kernels.masked_prototype_loss(
                feature, promote(masks), identities
            )
            return alignment + self.entropy_weight * entropy
