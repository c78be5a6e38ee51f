"""What is exported: a network from its input to an embedding, and the words that go with it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from gsalign import __version__
from gsalign.data import normalize
from gsalign.model import GSAlign
from gsalign.search import fingerprint

Normalisation = Literal["inside", "outside"]

# Of the batch; a bound is what PyTorch wants to know of a size that varies.
LARGEST_BATCH = 4096


class EmbeddingModule(nn.Module):
    """Images to unit vectors, as :class:`gsalign.search.Embedder` makes them of resized images.

    Args:
        network: its mode and device are kept; parameters stop wanting gradients.
        normalisation: ``"outside"``: images come normalised, -1 to 1; ``"inside"``: they come with
            pixel values 0 to 255, as floating-point numbers, and are normalised here, once.
    """

    def __init__(self, network: GSAlign, normalisation: Normalisation = "outside") -> None:
        super().__init__()
        if normalisation not in ("inside", "outside"):
            raise ValueError(
                f"normalisation is {normalisation!r}; it must be 'inside' or 'outside'"
            )
        self.network = network.requires_grad_(False)
        self.normalisation: Normalisation = normalisation

    def forward(self, images: Tensor) -> Tensor:
        """Embed ``[B, 3, H, W]`` to ``[B, D]``, unit vectors."""
        if self.normalisation == "inside":
            images = normalize(images)
        return functional.normalize(self.network.embed(images), dim=1)

    def example(self, batch: int, *, seed: int = 0) -> Tensor:
        """Random images of the kind that is wanted: ``[batch, 3, H, W]``, with soft shapes."""
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.rand(batch, 3, 8, 4, generator=generator)
        pixels = functional.interpolate(coarse, self.network.config.image_size, mode="bilinear")
        if self.normalisation == "inside":
            return pixels.mul(255.0).round()
        return pixels.mul(2.0).sub(1.0)

    def metadata(self) -> dict[str, str]:
        """What the user of the file has to know, for the file itself to say."""
        height, width = self.network.config.image_size
        expected = {
            "inside": "pixel values 0 to 255; normalised inside, do not normalise again",
            "outside": "normalised by (x - 127.5) / 127.5 to -1 to 1 before; not inside",
        }
        return {
            "producer": f"gsalign {__version__}",
            "input": f"images: float32 [batch, 3, {height}, {width}], RGB, "
            f"{expected[self.normalisation]}",
            "resize": f"bicubic, antialiased, to {height} x {width} before",
            "normalisation": self.normalisation,
            "output": f"embeddings: float32 [batch, {self.network.config.embedding_size}], unit "
            "vectors; compare by cosine",
            "slots": str(1 + self.network.config.parts),
            "network": fingerprint(self.network).network,
        }
