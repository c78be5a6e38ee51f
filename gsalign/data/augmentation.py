"""What was drawn for a batch as tensors, and doing it: on the CPU or on a GPU, without waiting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of a batch of images; called with them it does it, and moves label maps.

    Small: the geometry is a term per column and one per row of the output. Made by
    :meth:`gsalign.data.TrainTransform.plan`; ``None`` where a step is off.

    Attributes:
        corner: int64 ``[B, 2]`` (y, x) of the crop in the padded image, where nothing is rotated.
        flip: bool ``[B]``, for the same case.
        columns: float32 ``[B, 2, W]``, what a column adds to (x, y) of where the output reads.
        rows: float32 ``[B, 2, H]``, what a row adds.
        shift: float32 ``[B, 2]`` (x, y), from the crop to the image.
        colour: float32 ``[B, 3, 3]``, the affine map of colours, to the normalised scale.
        grey: float32 ``[B, 3]``, weights of the mean colour in its offset.
        erased: int64 ``[B, 4]``: top, left, height and width of the rectangle; zeros for none.
        fill: float32 ``[3]``, its normalised colour.
        padding: pixels of black border before the crop.
    """

    corner: Tensor | None
    flip: Tensor | None
    columns: Tensor | None
    rows: Tensor | None
    shift: Tensor | None
    colour: Tensor | None
    grey: Tensor | None
    erased: Tensor | None
    fill: Tensor | None
    padding: int

    def map(self, function: Callable[[Tensor], Tensor]) -> Augmentation:
        """The same with ``function`` of every tensor, as to move it."""
        values: dict[str, Any] = {
            item.name: function(value)
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), Tensor)
        }
        return replace(self, **values)

    def __call__(
        self, images: Tensor, *, between: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Augment and normalise.

        Args:
            images: uint8 ``[B, 3, H, W]`` on the device of the tensors; not changed.
            between: done to the float images, 0 .. 255, between geometry and colour.

        Returns:
            float32 ``[B, 3, H, W]`` in [-1, 1].
        """
        pixels = self._placed(images, "bilinear")
        if between is not None:
            pixels = between(pixels)
        pixels = self._coloured(pixels)
        return pixels if self.fill is None else self._without_rectangles(pixels, self.fill)

    def label_maps(self, labels: Tensor) -> Tensor:
        """Move label maps as the images: what a pixel shows, its label says.

        Where nothing of the image is left, in the black border and in an erased rectangle, the
        label is 0, the background: nobody can be seen there.

        Args:
            labels: uint8 ``[B, H, W]`` on the device of the tensors; not changed.

        Returns:
            uint8 ``[B, H, W]``, contiguous; by the label of the nearest pixel.
        """
        placed = self._placed(labels.unsqueeze(1), "nearest").to(torch.uint8)
        if self.erased is not None:
            placed = self._without_rectangles(placed, placed.new_zeros(1))
        return placed.squeeze(1)

    def _placed(self, images: Tensor, mode: str) -> Tensor:
        """Crop, flip, rotate and scale: float32 of the same shape, 0 .. 255; a new tensor."""
        return self._copied(images) if self.columns is None else self._warped(images, mode)

    def _copied(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if self.corner is None or self.flip is None:
            return images.float()
        padded = F.pad(images, [self.padding] * 4)
        row = torch.arange(height, device=images.device) + self.corner[:, :1]
        column = torch.arange(width, device=images.device)
        column = torch.where(self.flip.unsqueeze(1), width - 1 - column, column)
        column = column + self.corner[:, 1:]
        place = row.unsqueeze(2) * padded.shape[-1] + column.unsqueeze(1)
        place = place.flatten(1).unsqueeze(1).expand(-1, images.shape[1], -1)
        return padded.flatten(2).gather(2, place).view_as(images).float()

    def _warped(self, images: Tensor, mode: str) -> Tensor:
        assert self.columns is not None and self.rows is not None
        x, y = (self.columns[:, axis, None, :] + self.rows[:, axis, :, None] for axis in (0, 1))
        if self.shift is not None:
            # -1 and 1 are the outer edges of the crop.
            outside = (x.abs() > 1.0).logical_or_(y.abs() > 1.0)
            x += self.shift[:, 0, None, None]
            y += self.shift[:, 1, None, None]
            # Far away is black, too.
            x.masked_fill_(outside, 9.0)
        return F.grid_sample(
            images.float(),
            torch.stack([x, y], dim=-1),
            mode=mode,
            padding_mode="zeros",
            align_corners=False,
        )

    def _coloured(self, pixels: Tensor) -> Tensor:
        if self.colour is None or self.grey is None:
            return pixels.sub_(127.5).div_(127.5).clamp_(-1.0, 1.0)
        offset = (pixels.mean((2, 3)) * self.grey).sum(1, keepdim=True)
        result = torch.baddbmm(
            ((offset - 127.5) / 127.5).unsqueeze(2).expand(-1, 3, 1),
            self.colour,
            pixels.flatten(2),
        )
        return result.clamp_(-1.0, 1.0).view_as(pixels)

    def _without_rectangles(self, pixels: Tensor, fill: Tensor) -> Tensor:
        assert self.erased is not None
        if pixels.device.type != "cpu":
            return self._masked(pixels, self.erased, fill)
        # Where the figures are at hand, writing the rectangles beats looking at every pixel.
        for image, (top, left, height, width) in zip(pixels, self.erased.tolist(), strict=True):
            image[:, top : top + height, left : left + width] = fill.view(-1, 1, 1)
        return pixels

    @staticmethod
    def _masked(pixels: Tensor, erased: Tensor, fill: Tensor) -> Tensor:
        inside = []
        for axis, size in ((0, pixels.shape[2]), (1, pixels.shape[3])):
            first = erased[:, axis, None]
            place = torch.arange(size, device=pixels.device)
            inside.append((place >= first) & (place < first + erased[:, 2 + axis, None]))
        both = inside[0].unsqueeze(2) & inside[1].unsqueeze(1)
        return torch.where(both.unsqueeze(1), fill.view(-1, 1, 1), pixels)
