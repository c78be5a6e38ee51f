"""Turning images upright before the network sees them; an extension beyond the published code.

The angle is a direction, (cos, sin) of the roll, over the full circle. It lives in the image
squeezed to a square, where turning by any angle keeps the inscribed disc and everything in it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

import gsalign_kernels
from gsalign.model.config import OrientationConfig
from gsalign.model.precision import promote, without_autocast

CANDIDATES = 16
"""Turns of an aerial image that are compared with ground images, evenly over the circle."""

SHARPNESS = 20.0
"""How much likelier a turn is whose correlation with the ground images is higher by 1, as log."""


def unit(vectors: Tensor) -> Tensor:
    """``[B, 2]`` of length 1; the gradient is finite at 0, where the result is 0 too."""
    return vectors / (vectors.square().sum(dim=1, keepdim=True) + 1e-6).sqrt()


def directions(angle: Tensor) -> Tensor:
    """Radians ``[...]`` to (cos, sin) ``[..., 2]``."""
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def rotated(direction: Tensor, by: Tensor) -> Tensor:
    """Directions turned further: ``[B, 2], [B, 2] -> [B, 2]``, the product of complex numbers."""
    (c, s), (d, t) = direction.unbind(-1), by.unbind(-1)
    return torch.stack([c * d - s * t, s * d + c * t], dim=-1)


def turn(
    images: Tensor, direction: Tensor, *, aspect: float = 1.0, mode: str = "bilinear"
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

    Returns:
        Like ``images``; beyond the border its pixels go on.
    """
    cosine, sine = direction.unbind(dim=1)
    matrix = torch.stack([cosine, -sine, aspect**2 * sine, cosine], dim=1).unflatten(1, (2, 2))
    ends = 2 * centres(2, matrix)
    corners = torch.stack([ends.repeat(2), ends.repeat_interleave(2)], dim=1)
    return gsalign_kernels.warp_image(
        images,
        corners,
        corners @ matrix.transpose(1, 2),
        mode=mode,
        padding_mode="border",
        align_corners=False,
    )


def centres(size: int, like: Tensor) -> Tensor:
    """Where the pixels of a row lie in [-1, 1], ``[size]``, of the type of ``like`` and there."""
    # Made where it is used: no copy from the host, nothing to be lost in a checkpoint.
    return (torch.arange(size, dtype=like.dtype, device=like.device) + 0.5) * (2 / size) - 1


def squared_radius(size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """x^2 ``[1, size]`` and y^2 ``[size, 1]`` of the pixels of a square copy."""
    squares = centres(size, like).square()
    return squares.unsqueeze(0), squares.unsqueeze(1)


def standardised(images: Tensor, weights: Tensor) -> Tensor:
    """Each channel without its mean, each image over its deviation, both under the weights.

    Args:
        images: ``[B, C, S, S]``.
        weights: ``[S, S]`` with sum 1.
    """
    images = images - (images * weights).sum(dim=(2, 3), keepdim=True)
    variance = (images.square() * weights).sum(dim=(2, 3), keepdim=True).mean(dim=1, keepdim=True)
    # 0.05: noise of an image of one colour stays noise.
    return images / (variance.sqrt() + 0.05)


class OrientationPredictor(nn.Module):
    """The direction of a person's roll from a small square copy of the image.

    Three convolutions of stride 2 with group norms, a hidden layer, two numbers made a unit vector.
    Only the disc that a turn leaves in place is looked at: the corners would give the turn away.

    Args:
        config: side of the copy and widths.
    """

    def __init__(self, config: OrientationConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for channels in config.channels:
            convolution = nn.Conv2d(width, channels, 3, stride=2, padding=1, bias=False)
            layers += [convolution, nn.GroupNorm(math.gcd(4, channels), channels), nn.ReLU()]
            width = channels
        side = config.size >> len(config.channels)
        self.body = nn.Sequential(*layers)
        self.hidden = nn.Linear(width * side * side, config.hidden)
        self.out = nn.Linear(config.hidden, 2)

    def forward(self, copies: Tensor) -> Tensor:
        """``[B, 3, S, S] -> [B, 2]``, (cos, sin) of the roll, float32 or float64."""
        x, y = squared_radius(copies.shape[2], copies)
        disc = ((x + y) < 1).to(copies.dtype)
        seen = standardised(copies, disc / disc.sum()) * disc
        hidden = self.hidden(self.body(seen).flatten(1)).relu()
        with without_autocast(copies):
            return unit(promote(self.out(hidden.to(self.out.weight.dtype))))


class Uprighting(nn.Module):
    """Predicts every image's roll and undoes it.

    The predictor learns from :meth:`loss` alone: images are turned by directions without gradient.

    Args:
        image_size: (height, width) of the images.
        config: of the predictor.
    """

    def __init__(self, image_size: tuple[int, int], config: OrientationConfig) -> None:
        super().__init__()
        self.size = config.size
        self.aspect = image_size[1] / image_size[0]
        self.predictor = OrientationPredictor(config)

    def copies(self, images: Tensor) -> Tensor:
        """The small square copies that are looked at: ``[B, 3, H, W] -> [B, 3, S, S]``."""
        return functional.interpolate(images, size=(self.size, self.size), mode="area")

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Turned images ``[B, 3, H, W]`` and the directions they had, ``[B, 2]``; no gradient."""
        with torch.no_grad():
            direction = self.predictor(self.copies(images))
            return self.turn(images, direction), direction

    def turn(self, images: Tensor, direction: Tensor, *, mode: str = "bilinear") -> Tensor:
        """Undo given rolls, rigidly in pixels; see :func:`turn`."""
        return turn(images, direction.to(images.dtype), aspect=self.aspect, mode=mode)

    def loss(self, images: Tensor, identities: Tensor, views: Tensor) -> Tensor:
        """How far predictions are from what a batch tells about its rolls.

        Every image is turned by an angle drawn anew over the full circle, and its prediction must
        be :func:`targets` turned by as much: mean of ``|t| - u . R t``. So the prediction is held
        equivariant, and its constant and its sense are fixed.

        Args:
            images: ``[B, 3, H, W]``, not yet turned.
            identities: ``[B]`` int64.
            views: ``[B]`` int64, 0 ground, 1 aerial.

        Returns:
            Scalar of at least 0.
        """
        with torch.no_grad():
            copies = self.copies(images)
            wanted = targets(copies, identities, views)
            drawn = torch.rand(len(copies), device=copies.device) * (2 * math.pi)
            turned = turn(copies, directions(-drawn).to(copies.dtype))
        predicted = self.predictor(turned)
        with without_autocast(copies):
            wanted = rotated(wanted, directions(drawn)).to(predicted.dtype)
            return (wanted.norm(dim=1) - (predicted * wanted).sum(dim=1)).mean()


def targets(copies: Tensor, identities: Tensor, views: Tensor) -> Tensor:
    """What a batch tells about its rolls, without any label of angles.

    A ground camera stands upright: (1, 0). An aerial image, turned upright, looks like the ground
    images of the same person: hair, coat and trousers lie in the same order. So of 16 turns the
    likelier ones correlate better with the mean of that person's ground images in the batch; the
    target is their mean direction, the shorter the less they agree. Without ground images it is 0.

    Args:
        copies: ``[B, 3, S, S]``, the square copies.
        identities: ``[B]`` int64.
        views: ``[B]`` int64, 0 ground, 1 aerial.

    Returns:
        ``[B, 2]``, of length at most 1, float32 or float64.
    """
    with without_autocast(copies):
        copies = promote(copies)
        batch, _, size, _ = copies.shape
        weights = _body_weights(size, copies)
        seen = standardised(copies, weights)
        ground = views == 0
        mates = (identities.unsqueeze(1) == identities.unsqueeze(0)) & ground
        share = mates / mates.sum(dim=1, keepdim=True).clamp(min=1)
        pattern = ((share.to(copies) @ seen.flatten(1)).view_as(seen) * weights).flatten(1)

        angles = torch.arange(CANDIDATES, device=copies.device) * (2 * math.pi / CANDIDATES)
        candidates = directions(angles).to(copies)
        turned = turn(
            copies.repeat(CANDIDATES, 1, 1, 1), candidates.repeat_interleave(batch, dim=0)
        )
        turned = standardised(turned, weights).flatten(1).view(CANDIDATES, batch, -1)
        correlation = (turned * pattern).sum(dim=2) / 3
        aerial = (SHARPNESS * correlation).softmax(dim=0).T @ candidates
        aerial = aerial * mates.any(dim=1, keepdim=True)
        return torch.where(ground.unsqueeze(1), candidates[:1], aerial)


def _body_weights(size: int, like: Tensor) -> Tensor:
    """Where a person stands in an upright image: a bell of 0.35 x 0.6 in the disc, sum 1."""
    x, y = squared_radius(size, like)
    weights = torch.exp(-x / (2 * 0.35**2) - y / (2 * 0.6**2)) * ((x + y) < 1)
    return weights / weights.sum()
