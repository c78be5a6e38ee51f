"""Part masks finer than the patch map: what is there from the tokens, where it ends from pixels."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

CHANNELS = 32
"""Channels of a cell inside the decoder."""


class MaskDecoder(nn.Module):
    """Logits of cells from the tokens of their patches and the pixels in them.

    A token knows which part its patch shows, but not where inside the patch the part ends: a linear
    function of it draws blurred squares. So each cell adds what its token says about it and what
    its pixels look like, and asks its neighbours twice.

    Args:
        width: channels of a token.
        size: rows and columns of the patch map.
        patch: side of a patch in pixels.
        cells: cells along a side of a patch; divides ``patch``.
        outputs: channels of the logits.
    """

    def __init__(
        self, width: int, size: tuple[int, int], patch: int, cells: int, outputs: int
    ) -> None:
        super().__init__()
        self.size = size
        self.cells = cells
        side = patch // cells
        self.tokens = nn.Linear(width, CHANNELS * cells * cells)
        self.pixels = nn.Conv2d(3, CHANNELS, side, stride=side)
        self.neighbours = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.out = nn.Conv2d(CHANNELS, outputs, 3, padding=1)
        nn.init.trunc_normal_(self.out.weight, std=0.02)
        assert self.out.bias is not None
        nn.init.zeros_(self.out.bias)

    def forward(self, tokens: Tensor, images: Tensor) -> Tensor:
        """Logits of cells, row by row.

        Args:
            tokens: ``[B, N, C]`` of the patches.
            images: ``[B, 3, H, W]``, normalised.

        Returns:
            ``[B, outputs, M]``.
        """
        cells = (CHANNELS, self.cells, self.cells)
        told = self.tokens(tokens).unflatten(2, cells).unflatten(1, self.size)
        told = told.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        seen = functional.gelu(told + self.pixels(images))
        return self.out(functional.gelu(self.neighbours(seen))).flatten(2)
