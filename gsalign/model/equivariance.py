"""Holding LTPS to what it is for: an image turned by an angle is to be turned back by it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gsalign.model.affine import read_affine
from gsalign.model.precision import promote

EVERY = 4
"""Every so many images of a batch are looked at a second time, turned."""


def random_turns(images: Tensor) -> Tensor:
    """One angle per image, uniform over the full circle: ``[B]``, radians."""
    like = promote(images)
    return (torch.rand(like.shape[0], dtype=like.dtype, device=like.device) * 2 - 1) * math.pi


def turned(images: Tensor, angle: Tensor) -> Tensor:
    """Images whose content is turned anticlockwise, rigidly in pixels, about the middle.

    Output position p reads at R(angle) p, as the rotation of LTPS has it. Beyond the border its
    pixels go on.

    Args:
        images: ``[B, C, H, W]``.
        angle: ``[B]``, radians.
    """
    aspect = images.shape[3] / images.shape[2]
    cosine, sine = angle.cos(), angle.sin()
    return read_affine(images, (cosine, -sine / aspect, aspect * sine, cosine))


def equivariance_costs(angles: Tensor, turned_angles: Tensor, turns: Tensor) -> Tensor:
    """How far the composed angle of a turned image is from the image's own, less the turn.

    The composed angle is the sum over the layers; differences are circular, ``1 - cos``.

    Args:
        angles: ``[L, B]``, radians, of images.
        turned_angles: ``[L, B]``, of the same images :func:`turned`.
        turns: ``[B]``, radians, by which they were.

    Returns:
        ``[B]`` in [0, 2].
    """
    return 1.0 - (turned_angles.sum(dim=0) + turns - angles.sum(dim=0)).cos()
