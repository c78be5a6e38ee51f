"""Body parts: spatial masks on the final patch tokens, part embeddings and their visibility.

An extension beyond the published code, whose masks are over channels only; the paper's abstract
speaks of "visibility-aware masks that highlight visible body regions", and these are such masks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

import gsalign_kernels
from gsalign.model.heads import ClassifierHead
from gsalign.model.losses import weighted_classification
from gsalign.model.ltps import PREFIX
from gsalign.model.mask_decoder import MaskDecoder
from gsalign.model.precision import promote

STRIPE_LOGIT = 2.0
"""What the logit of a part starts with in its stripe, above the others' 0."""


@dataclass(frozen=True)
class PartOutput:
    """What the network sees of the parts of a batch.

    Attributes:
        logits: ``[B, P + 1, N]`` of the masks of patches; channel 0 is the background.
        pooled: ``[B, P, C]``, the mean patch token of every part, weighted by its mask.
        visibility: ``[B, P]`` in [0, 1], the largest weight of the part anywhere on its mask; with
            several cells to a patch the mean over as many cells, those of the largest weights. A
            single small cell is soon full, whoever hides the rest.
        cell_logits: ``[B, P + 1, M]`` of the masks of cells, row by row; ``logits`` where a patch
            is one cell. The mask of a patch is the mean over its cells.
    """

    logits: Tensor
    pooled: Tensor
    visibility: Tensor
    cell_logits: Tensor

    @property
    def masks(self) -> Tensor:
        """``[B, P + 1, M]`` of cells, background first, summing to 1 over the channels."""
        return self.cell_logits.softmax(dim=1)


@dataclass(frozen=True)
class PartEmbeddings:
    """Embeddings of whole images and of their parts, for :func:`gsalign_kernels.part_distance`.

    Attributes:
        vectors: ``[B, 1 + P, C]``; 0 is the whole image.
        visibility: ``[B, 1 + P]`` in [0, 1]; 1 for the whole image.
    """

    vectors: Tensor
    visibility: Tensor

    def flat(self) -> Tensor:
        """One vector an image, ``[B, (1 + P) * C]``: unit vectors times the root of visibility.

        The dot product of two of them is the sum over parts of cosine times root of both
        visibilities, the numerator of the part distance; so an index of plain vectors can shortlist
        what the part distance then ranks.
        """
        unit = functional.normalize(self.vectors, dim=2)
        return (unit * self.visibility.sqrt().unsqueeze(2)).flatten(1)


class PartBranch(nn.Module):
    """A softmax over P parts and the background at every cell, and an identity head per part.

    The masks' logits are a linear function of the patch token, or with several cells to a patch
    what :class:`MaskDecoder` makes of it, plus a learned bias by position, which starts as
    horizontal stripes, one per part: with parts that all start alike, each would get the gradient
    of all others and none become a part. Tokens are pooled under the mean of a patch's cells.

    Args:
        width: channels of a token.
        size: rows and columns of the patch map.
        parts: P.
        num_identities: classes of the heads.
        cells: cells along a side of a patch.
        patch: side of a patch in pixels; read with several cells.
    """

    def __init__(
        self,
        width: int,
        size: tuple[int, int],
        parts: int,
        num_identities: int,
        cells: int = 1,
        patch: int = 16,
    ) -> None:
        super().__init__()
        self.size = size
        self.cells = cells
        stripes = gsalign_kernels.stripe_masks((size[0] * cells, size[1] * cells), parts)
        background = stripes.new_zeros(1, stripes.shape[1])
        self.position_bias = nn.Parameter(STRIPE_LOGIT * torch.cat([background, stripes]))
        self.mask: nn.Linear | MaskDecoder
        if cells > 1:
            self.mask = MaskDecoder(width, size, patch, cells, parts + 1)
        else:
            self.mask = nn.Linear(width, parts + 1)
            nn.init.trunc_normal_(self.mask.weight, std=0.02)
            nn.init.zeros_(self.mask.bias)
        self.heads = nn.ModuleList(ClassifierHead(width, num_identities) for _ in range(parts))

    def forward(self, tokens: Tensor, images: Tensor) -> PartOutput:
        """Masks, part embeddings and visibilities.

        Args:
            tokens: ``[B, 2 + N, C]``, the final ones.
            images: ``[B, 3, H, W]``, normalised.
        """
        patches = tokens[:, PREFIX:]
        if isinstance(self.mask, MaskDecoder):
            content = promote(self.mask(patches, images))
        else:
            content = promote(self.mask(patches)).transpose(1, 2)
        cell_logits = content + self.position_bias.to(content.dtype)
        logits = self._of_patches(cell_logits)
        pooled, visibility = gsalign_kernels.masked_part_pool(
            tokens, logits, prefix=PREFIX, activation="softmax", background=True
        )
        if self.cells > 1:
            cells = cell_logits.softmax(dim=1)[:, 1:]
            visibility = cells.topk(self.cells**2, dim=2).values.mean(dim=2)
        return PartOutput(logits, promote(pooled), visibility, cell_logits)

    def _of_patches(self, cell_logits: Tensor) -> Tensor:
        """Logits ``[B, P + 1, N]`` whose softmax is the mean of a patch's cells."""
        if self.cells == 1:
            return cell_logits
        rows, columns = self.size
        log_masks = cell_logits.log_softmax(dim=1)
        cells = log_masks.unflatten(2, (rows, self.cells, columns, self.cells))
        # The logarithm of the sum: a softmax does not see the constant that makes it the mean.
        return cells.logsumexp(dim=(3, 5)).flatten(2)

    def embed(self, pooled: Tensor) -> Tensor:
        """Every part through its head's neck, under the running statistics: ``[B, P, C]``."""
        parts = pooled.unbind(dim=1)
        heads = cast("list[ClassifierHead]", self.heads)
        return torch.stack([h.embed(p) for h, p in zip(heads, parts, strict=True)], dim=1)

    def identity_loss(self, parts: PartOutput, identities: Tensor) -> Tensor:
        """Cross-entropy of every part's own classifier, weighted by how visible the part is.

        The weights are constants: a part cannot lower its loss by hiding.
        """
        pooled = parts.pooled.unbind(dim=1)
        logits = [head(part) for head, part in zip(self.heads, pooled, strict=True)]
        return weighted_classification(
            torch.stack(logits, dim=1), identities, parts.visibility.detach()
        )
