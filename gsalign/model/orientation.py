"""Aligning images before the network sees them; an extension beyond the published code.

They are turned upright, and by choice the person is cut out.

The angle is a direction, (cos, sin) of the roll, over the full circle. Where it is read is another
module's: :mod:`gsalign.model.orientation_rays` needs no labels, and
:mod:`gsalign.model.orientation_parts` learns from label maps of body parts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gsalign.model.affine import read_affine
from gsalign.model.config import OrientationConfig


def unit(vectors: Tensor) -> Tensor:
    """``[B, 2]`` of length 1; the gradient is finite at 0, where the result is 0 too."""
    return vectors / (vectors.square().sum(dim=1, keepdim=True) + 1e-6).sqrt()


def directions(angle: Tensor) -> Tensor:
    """Radians ``[...]`` to (cos, sin) ``[..., 2]``."""
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def turn(
    images: Tensor,
    direction: Tensor,
    *,
    aspect: float = 1.0,
    mode: str = "bilinear",
    padding_mode: str = "border",
) -> Tensor:
    """Undo a roll: the content is turned anticlockwise by the direction's angle.

    With (c, s) the direction, output pixel (X, Y) in [-1, 1] reads at
    ``(c X - s Y, aspect^2 s X + c Y)``. For an aspect of width over height that is rigid in pixels:
    a turn and one scale, such that what reached along the roll to the ellipse inscribed in the
    image now reaches from top to bottom. It is linear in the direction, and at (1, 0) the identity.
    With an aspect of 1 it is a turn of the square that the image is when squeezed.

    Args:
        images: ``[B, C, H, W]``.
        direction: ``[B, 2]`` unit vectors; gradients flow into it.
        aspect: width over height of the pixels that are to be turned rigidly.
        mode: ``"bilinear"`` or ``"nearest"``.
        padding_mode: what is read beyond the border: as ``"border"`` its pixels go on.

    Returns:
        Like ``images``.
    """
    cosine, sine = direction.unbind(dim=1)
    return read_affine(
        images,
        (cosine, -sine, aspect**2 * sine, cosine),
        mode=mode,
        padding_mode=padding_mode,
    )


@dataclass(frozen=True)
class Aligned:
    """Images as the network sees them, and what was done to them.

    Attributes:
        images: ``[B, 3, H, W]``, aligned.
        direction: ``[B, 2]``, (cos, sin) of the roll that was undone; None where nothing is turned.
        person: ``[B, 1, H, W]``, the share of the person in every pixel of the images as they came,
            before the turn; None where nothing is cut out.
    """

    images: Tensor
    direction: Tensor | None = None
    person: Tensor | None = None


class Uprighting(nn.Module, ABC):
    """Predicts every image's roll and undoes it; how it is predicted and learned is a subclass's.

    By choice it cuts the person out, too, or does that alone. The predictor learns from
    :meth:`loss` alone: images are aligned by what it says without gradient.

    Args:
        image_size: (height, width) of the images.
        config: what is done to images.
    """

    def __init__(self, image_size: tuple[int, int], config: OrientationConfig) -> None:
        super().__init__()
        self.aspect = image_size[1] / image_size[0]
        self.turns = config.turns
        self.cuts_out = config.cuts_out

    @abstractmethod
    def see(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The roll, and which pixels are of the person.

        Args:
            images: ``[B, 3, H, W]``.

        Returns:
            (cos, sin) of the roll, ``[B, 2]``, and the share of the person in every pixel,
            ``[B, 1, H, W]``, or None where that is not asked for; float32 or float64.
        """

    def direction(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W] -> [B, 2]``, (cos, sin) of the roll, float32 or float64."""
        return self.see(images)[0]

    @abstractmethod
    def look(self, images: Tensor, part_labels: Tensor | None) -> tuple[Tensor, ...]:
        """What :meth:`loss` compares, a row per image, so that processes can exchange it.

        Args:
            images: ``[B, 3, H, W]`` that are not yet turned.
            part_labels: uint8 ``[B, H, W]`` of these images, or None; see :meth:`GSAlign.losses`.

        Returns:
            ``[B, ...]`` each, with the predictor's gradient.
        """

    @abstractmethod
    def loss(self, looked: Sequence[Tensor], identities: Tensor, views: Tensor) -> Tensor:
        """How wrong the predictor is about the images of :meth:`look`.

        Args:
            looked: of these images, or of those of all processes.
            identities: ``[B]`` int64.
            views: ``[B]`` int64, 0 ground, 1 aerial.

        Returns:
            Scalar of at least 0.
        """

    def forward(self, images: Tensor) -> Aligned:
        """Align ``[B, 3, H, W]``; no gradient."""
        with torch.no_grad():
            direction, person = self.see(images)
            if person is not None:
                images = images * person.to(images.dtype)
            if not self.turns:
                return Aligned(images, person=person)
            return Aligned(self.turn(images, direction), direction, person)

    def turn(self, images: Tensor, direction: Tensor, *, mode: str = "bilinear") -> Tensor:
        """Undo given rolls, rigidly in pixels; see :func:`turn`."""
        # Who was cut out stands before grey, which goes on beyond the border; the feet do not.
        padding_mode = "zeros" if self.cuts_out else "border"
        return turn(
            images,
            direction.to(images.dtype),
            aspect=self.aspect,
            mode=mode,
            padding_mode=padding_mode,
        )

    def turn_labels(self, labels: Tensor, direction: Tensor) -> Tensor:
        """Turn label maps, uint8 ``[B, H, W]``, as the images were turned."""
        maps = labels.unsqueeze(1).to(torch.float32)
        return self.turn(maps, direction, mode="nearest").squeeze(1).to(labels.dtype)

    def turn_labels_back(self, labels: Tensor, direction: Tensor, outside: int) -> Tensor:
        """Label maps of turned images, uint8 ``[B, H, W]``, as those of the images they were.

        Args:
            labels: uint8 ``[B, H, W]``.
            direction: ``[B, 2]``, by which the images were turned.
            outside: label of what the turn moved out of the image.
        """
        cosine, sine = direction.unbind(dim=1)
        # The turn is linear in its direction, so this is its inverse, scale included.
        inverse = torch.stack([cosine, -sine], dim=1)
        inverse = inverse / (cosine.square() + (self.aspect * sine).square()).unsqueeze(1)
        # Beyond the border zeros are read.
        maps = labels.unsqueeze(1).to(torch.float32) - outside
        back = turn(
            maps,
            inverse.to(maps.dtype),
            aspect=self.aspect,
            mode="nearest",
            padding_mode="zeros",
        )
        return (back + outside).squeeze(1).to(labels.dtype)
