"""Thirteen cameras: where each image is taken from, and how the person is cropped.

World frame: origin on the ground under the person, z up, the camera on the side of negative y.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gsalign.data.synthetic.draws import Draws
from gsalign.data.synthetic.geometry import dot, vector


@dataclass(frozen=True)
class Viewpoint:
    """A batch of cameras; angles in radians, ``[B]`` unless said otherwise.

    Attributes:
        elevation: how far the camera looks down.
        heading: where the person walks, seen by the camera before it is rolled: 0 towards it,
            π/2 to the right of the image, π away.
        roll: the image of "up" is turned clockwise by this angle.
        position: ``[B, 3]`` camera centre.
        right, up, forward: ``[B, 3]`` camera axes before the roll.
        centre_x, centre_y: crop centre on the rolled image plane at distance 1.
        scale_x, scale_y: output pixels per unit of that plane.
    """

    elevation: Tensor
    heading: Tensor
    roll: Tensor
    position: Tensor
    right: Tensor
    up: Tensor
    forward: Tensor
    centre_x: Tensor
    centre_y: Tensor
    scale_x: Tensor
    scale_y: Tensor
    distance: Tensor

    def project(self, points: Tensor, size: tuple[int, int], raster: tuple[int, int]) -> Tensor:
        """World points ``[B, N, 3]`` to pixels x, y and depth ``[B, N, 3]``.

        Args:
            points: world coordinates, metres.
            size: (height, width) of the output image.
            raster: (height, width) of the raster that shows the same picture.
        """
        x, y, depth = _plane(points, self.position, self.right, self.up, self.forward, self.roll)
        px = (x - self.centre_x[:, None]) * self.scale_x[:, None] + size[1] / 2
        py = (y - self.centre_y[:, None]) * self.scale_y[:, None] + size[0] / 2
        px, py = px * (raster[1] / size[1]), py * (raster[0] / size[0])
        return torch.stack((px, py, depth), dim=-1)

    def rays(self, size: tuple[int, int], raster: tuple[int, int]) -> Tensor:
        """World directions ``[B, H', W', 3]`` through pixel centres, their forward part 1.

        Args:
            size: (height, width) of the output image.
            raster: (height, width) of the raster that shows the same picture.
        """
        (height, width), (rows, columns) = size, raster
        device = self.roll.device
        px = torch.arange(columns, device=device, dtype=torch.float32) + 0.5 - columns / 2
        py = torch.arange(rows, device=device, dtype=torch.float32) + 0.5 - rows / 2
        px, py = px * (width / columns), py * (height / rows)
        x = px.view(1, 1, -1) / self.scale_x.view(-1, 1, 1) + self.centre_x.view(-1, 1, 1)
        y = py.view(1, -1, 1) / self.scale_y.view(-1, 1, 1) + self.centre_y.view(-1, 1, 1)
        sin, cos = torch.sin(self.roll).view(-1, 1, 1), torch.cos(self.roll).view(-1, 1, 1)
        plain_x = (x * cos + y * sin).unsqueeze(-1)
        plain_y = (y * cos - x * sin).unsqueeze(-1)
        axis = (slice(None), None, None)
        return self.forward[axis] + plain_x * self.right[axis] - plain_y * self.up[axis]


def _plane(
    points: Tensor, position: Tensor, right: Tensor, up: Tensor, forward: Tensor, roll: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    offset = points - position[:, None]
    depth = dot(offset, forward[:, None]).clamp(min=0.1)
    x = dot(offset, right[:, None]) / depth
    y = -dot(offset, up[:, None]) / depth
    sin, cos = torch.sin(roll)[:, None], torch.cos(roll)[:, None]
    return x * cos - y * sin, x * sin + y * cos, depth


def body_yaw(draws: Draws) -> tuple[Tensor, Tensor]:
    """Heading (see Viewpoint) and the turn about z that takes the body frame to the world."""
    heading = draws["yaw"] * (2.0 * math.pi)
    return heading, heading + math.pi


def place_cameras(
    cameras: Tensor,
    draws: Draws,
    points: Tensor,
    present: Tensor,
    size: tuple[int, int],
    aerial_roll: float = 180.0,
) -> Viewpoint:
    """Put every image's camera somewhere and crop the person.

    Camera 1 looks straight down (76°-89°), 2-5 are tilted (32°-66°) and, like camera 1, rolled by
    up to ``aerial_roll``; 6-13 stand on the ground (-2°-14°) within 2.5° of upright.

    Args:
        cameras: ``[B]`` int64, 1..13.
        draws: random numbers of the images.
        points: ``[B, V, 3]`` the person's vertices in world coordinates, metres.
        present: ``[B, V]`` bool, the vertices that count.
        size: (height, width) of the output.
        aerial_roll: largest roll of cameras 1-5 either way, degrees.
    """
    nadir = (cameras == 1).float()
    tilted = ((cameras >= 2) & (cameras <= 5)).float()
    ground = (cameras >= 6).float()
    degrees = math.pi / 180.0
    elevation = (
        nadir * draws.between("elevation", 76.0, 89.0)
        + tilted * draws.between("elevation", 32.0, 66.0)
        + ground * draws.between("elevation", -2.0, 14.0)
    ) * degrees
    # A full circle begins at 0, which gives the angles, and so the pixels, that it always gave.
    lowest = -aerial_roll if aerial_roll < 180.0 else 0.0
    roll = (
        (nadir + tilted) * draws.between("roll", lowest, lowest + 2.0 * aerial_roll)
        + ground * draws.between("roll", -2.5, 2.5)
    ) * degrees
    distance = (nadir + tilted) * draws.between("distance", 16.0, 45.0) + ground * draws.between(
        "distance", 5.0, 16.0
    )
    zero = torch.zeros_like(elevation)
    sin, cos = torch.sin(elevation), torch.cos(elevation)
    forward = vector(zero, cos, -sin)
    up = vector(zero, sin, cos)
    right = vector(zero + 1.0, zero, zero)
    target = vector(zero, zero, zero + 0.85)
    position = target - forward * distance.unsqueeze(-1)

    x, y, _ = _plane(points, position, right, up, forward, roll)
    far = torch.full_like(x, 1e9)
    left, right_ = torch.where(present, x, far).amin(1), torch.where(present, x, -far).amax(1)
    top, bottom = torch.where(present, y, far).amin(1), torch.where(present, y, -far).amax(1)
    width = (right_ - left) * draws.between("margin_x", 1.04, 1.16)
    height = (bottom - top) * draws.between("margin_y", 1.03, 1.11)
    centre_x = (left + right_) / 2 + (right_ - left) * draws.between("shift_x", -0.06, 0.06)
    centre_y = (top + bottom) / 2 + (bottom - top) * draws.between("shift_y", -0.045, 0.045)
    # A detector's box is stretched to the fixed size; boxes of very different shape are widened
    # instead, so that people keep looking like people.
    target_aspect = size[1] / size[0]
    aspect = width / height
    narrowest = target_aspect * (0.80 * ground + 0.85 * (1.0 - ground))
    widest = target_aspect * (1.25 * ground + 1.70 * (1.0 - ground))
    width = torch.where(aspect < narrowest, height * narrowest, width)
    height = torch.where(aspect > widest, width / widest, height)
    return Viewpoint(
        elevation=elevation,
        heading=body_yaw(draws)[0],
        roll=roll,
        position=position,
        right=right,
        up=up,
        forward=forward,
        centre_x=centre_x,
        centre_y=centre_y,
        scale_x=size[1] / width,
        scale_y=size[0] / height,
        distance=distance,
    )
