"""The roll from the rays of an image: equivariant by construction, learned without label maps.

It is read from the disc inscribed in the image squeezed to a square, in polar coordinates: there a
turn of the image is a circular shift, and a network of circular convolutions turns its answer by
just as much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from gsalign.model.config import OrientationConfig
from gsalign.model.orientation import Uprighting, directions, unit
from gsalign.model.precision import promote, without_autocast

SHARPNESS = 20.0
"""How much likelier a turn is whose correlation with the ground images is higher by 1, as log."""


def centres(size: int, like: Tensor) -> Tensor:
    """Where the pixels of a row lie in [-1, 1], ``[size]``, of the type of ``like`` and there."""
    # Made where it is used: no copy from the host, nothing to be lost in a checkpoint.
    return (torch.arange(size, dtype=like.dtype, device=like.device) + 0.5) * (2 / size) - 1


def rays(count: int, like: Tensor) -> Tensor:
    """Evenly over the circle, ``[count, 2]`` (cos, sin); 0 is up, then clockwise."""
    steps = torch.arange(count, dtype=like.dtype, device=like.device)
    return directions(steps * (2 * math.pi / count))


def radii(count: int, like: Tensor) -> Tensor:
    """Middles of rings of equal width, ``[count]`` in (0, 1)."""
    return (centres(count, like) + 1) / 2


def polar(images: Tensor, rings: int, angles: int) -> Tensor:
    """The inscribed disc, in the image squeezed to a square, by ring and ray.

    Args:
        images: ``[B, C, H, W]``.
        rings: R.
        angles: T.

    Returns:
        ``[B, C, R, T]``, in float32 or float64. Rolling the content clockwise by k rays moves
        column t to t + k.
    """
    side = 2 * rings
    copies = promote(functional.interpolate(images, size=(side, side), mode="area"))
    up, right = rays(angles, copies).unbind(dim=1)
    radius = radii(rings, copies).unsqueeze(1)
    grid = torch.stack([radius * right, -radius * up], dim=2)
    grid = grid.expand(copies.shape[0], -1, -1, -1)
    return functional.grid_sample(copies, grid, padding_mode="border", align_corners=False)


def standardised(maps: Tensor, weights: Tensor) -> Tensor:
    """Each channel without its mean, each image over its deviation, both under the weights.

    Args:
        maps: ``[B, C, R, T, ...]``.
        weights: ``[R, T, ...]`` or what broadcasts to it, summing to 1 over R and T.
    """
    maps = maps - (maps * weights).sum(dim=(2, 3), keepdim=True)
    variance = (maps.square() * weights).sum(dim=(2, 3), keepdim=True).mean(dim=1, keepdim=True)
    # 0.05: noise of an image of one colour stays noise.
    return maps / (variance.sqrt() + 0.05)


class OrientationPredictor(nn.Module):
    """The direction of a person's roll from the polar map of an image.

    Circular convolutions with group norms along the circle, whose channels at first are colours by
    ring, give one number per ray; the direction is their first harmonic, made a unit vector. So
    turning the content by a ray turns the answer by just as much, whatever the weights are.

    Args:
        config: rings, rays, widths and reach of the convolutions.
    """

    def __init__(self, config: OrientationConfig) -> None:
        super().__init__()
        self.rings, self.rays = config.rings, config.rays
        layers: list[nn.Module] = []
        width = 3 * config.rings
        for kernel in config.kernels:
            layers += [
                nn.Conv1d(
                    width,
                    config.width,
                    kernel,
                    padding=kernel // 2,
                    padding_mode="circular",
                    bias=False,
                ),
                nn.GroupNorm(1, config.width),
                nn.ReLU(),
            ]
            width = config.width
        self.body = nn.Sequential(*layers)
        self.out = nn.Conv1d(width, 1, 1, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """``[B, 3, R, T] -> [B, 2]``, (cos, sin) of the roll, float32 or float64."""
        area = radii(self.rings, maps).unsqueeze(1).expand(-1, self.rays)
        seen = standardised(maps, area / area.sum()).flatten(1, 2)
        with without_autocast(maps):
            # A few million products per image: float32 costs nothing, and a direction is delicate.
            scores = promote(self.out(self.body(seen.to(self.out.weight.dtype)))).squeeze(1)
            return unit(scores @ rays(self.rays, scores))


class UprightingByRays(Uprighting):
    """Reads the roll from rays; learns from upright ground images, see :func:`targets`.

    Args:
        image_size: (height, width) of the images.
        config: of the predictor.
    """

    def __init__(self, image_size: tuple[int, int], config: OrientationConfig) -> None:
        super().__init__(image_size, config)
        self.predictor = OrientationPredictor(config)

    def maps(self, images: Tensor) -> Tensor:
        """What the predictor looks at: ``[B, 3, H, W] -> [B, 3, R, T]``."""
        return polar(images, self.predictor.rings, self.predictor.rays)

    def see(self, images: Tensor) -> tuple[Tensor, None]:
        """See :meth:`Uprighting.see`."""
        return self.predictor(self.maps(images)), None

    def look(self, images: Tensor, part_labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Polar maps ``[B, 3, R, T]`` without gradient, and the predictor's directions."""
        maps = self.maps(images.detach())
        return maps, self.predictor(maps)

    def loss(self, looked: Sequence[Tensor], identities: Tensor, views: Tensor) -> Tensor:
        """See :func:`orientation_loss`."""
        maps, predicted = looked
        return orientation_loss(maps, predicted, identities, views)


def orientation_loss(maps: Tensor, predicted: Tensor, identities: Tensor, views: Tensor) -> Tensor:
    """How far predictions are from what a batch tells about its rolls.

    With u the prediction and t its :func:`targets` the mean of ``|t| - u . t``.

    Args:
        maps: ``[B, 3, R, T]``, see :func:`polar`.
        predicted: ``[B, 2]`` unit vectors.
        identities: ``[B]`` int64.
        views: ``[B]`` int64, 0 ground, 1 aerial.

    Returns:
        Scalar of at least 0.
    """
    wanted = targets(maps, identities, views).to(predicted.dtype)
    return (wanted.norm(dim=1) - (predicted * wanted).sum(dim=1)).mean()


@torch.no_grad()
def targets(maps: Tensor, identities: Tensor, views: Tensor) -> Tensor:
    """What a batch tells about its rolls, without any label of angles.

    A ground camera stands upright: (1, 0). An aerial image, turned upright, looks like the ground
    images of the same person: hair, coat and trousers lie in the same order. So of the turns by
    whole rays the likelier ones correlate better with the mean of that person's ground images in
    the batch; the target is their mean direction, the shorter the less they agree. Without ground
    images it is 0.

    Args:
        maps: ``[B, 3, R, T]``, see :func:`polar`.
        identities: ``[B]`` int64.
        views: ``[B]`` int64, 0 ground, 1 aerial.

    Returns:
        ``[B, 2]``, of length at most 1, float32 or float64.
    """
    with without_autocast(maps):
        rings, count = maps.shape[2:]
        weights = _body_weights(rings, count, maps)
        upright = standardised(maps, weights)
        ground = views == 0
        mates = (identities.unsqueeze(1) == identities.unsqueeze(0)) & ground
        share = mates / mates.sum(dim=1, keepdim=True).clamp(min=1)
        pattern = (share.to(maps) @ upright.flatten(1)).view_as(upright) * weights

        # Column (t, k) is what ray t shows when a roll by k rays is undone.
        ray = torch.arange(count, device=maps.device)
        shifted = maps[..., (ray.unsqueeze(1) + ray.unsqueeze(0)) % count]
        shifted = standardised(shifted, weights.unsqueeze(2))
        correlation = torch.einsum("bcrtk,bcrt->bk", shifted, pattern) / maps.shape[1]
        candidates = rays(count, maps)
        aerial = (SHARPNESS * correlation).softmax(dim=1) @ candidates
        aerial = aerial * mates.any(dim=1, keepdim=True)
        return torch.where(ground.unsqueeze(1), candidates[:1], aerial)


def _body_weights(rings: int, count: int, like: Tensor) -> Tensor:
    """Where a person stands in an upright image: a bell of 0.35 x 0.6, by area, ``[R, T]``."""
    up, right = rays(count, like).unbind(dim=1)
    radius = radii(rings, like).unsqueeze(1)
    x, y = radius * right, radius * up
    weights = radius * torch.exp(-x.square() / (2 * 0.35**2) - y.square() / (2 * 0.6**2))
    return weights / weights.sum()
