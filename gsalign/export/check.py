"""Comparing what was exported with the network it came from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gsalign.errors import GSAlignError
from gsalign.export.embedding import EmbeddingModule

BATCHES = (1, 3)
TOLERANCE = 1e-4


class ExportError(GSAlignError):
    """A network cannot be exported, or what was exported computes something else."""


@dataclass(frozen=True)
class Agreement:
    """How far exported and original embeddings are apart.

    Attributes:
        largest: absolute difference of any number of the unit vectors.
        images: how many were compared.
    """

    largest: float
    images: int

    def __str__(self) -> str:
        """In words."""
        return (
            f"{self.images} images, largest difference {self.largest:.1e} (allowed {TOLERANCE:.0e})"
        )


def compare(module: EmbeddingModule, exported: Callable[[Tensor], Tensor]) -> Agreement:
    """Run both on random images, in batches of other sizes than it was exported with.

    Args:
        module: the original.
        exported: images to embeddings.

    Raises:
        ExportError: they differ by more than 1e-4 somewhere.
    """
    largest = 0.0
    for batch in BATCHES:
        images = module.example(batch, seed=batch)
        with torch.no_grad():
            difference = (exported(images) - module(images)).abs().max()
        # NaN is larger than any limit.
        largest = max(largest, float(difference.nan_to_num(nan=torch.inf)))
    if not largest <= TOLERANCE:
        raise ExportError(
            f"what was exported differs from the network by {largest:.1e} (allowed "
            f"{TOLERANCE:.0e}): nothing was written"
        )
    return Agreement(largest=largest, images=sum(BATCHES))
