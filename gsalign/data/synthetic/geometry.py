"""Small vector helpers shared by the pose, the body and the camera."""

from __future__ import annotations

import torch
from torch import Tensor


def vector(x: Tensor, y: Tensor | float, z: Tensor | float) -> Tensor:
    """Stack three components, broadcast to the shape of ``x``, into ``[..., 3]``."""
    y = y if isinstance(y, Tensor) else torch.full_like(x, y)
    z = z if isinstance(z, Tensor) else torch.full_like(x, z)
    return torch.stack((x, y.expand_as(x), z.expand_as(x)), dim=-1)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product over the last axis, written out so that its rounding is the same everywhere."""
    return a[..., 0] * b[..., 0] + a[..., 1] * b[..., 1] + a[..., 2] * b[..., 2]


def cross(a: Tensor, b: Tensor) -> Tensor:
    """Cross product over the last axis, with broadcasting."""
    ax, ay, az = a.unbind(-1)
    bx, by, bz = b.unbind(-1)
    return torch.stack((ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx), dim=-1)


def normalise(a: Tensor, eps: float = 1e-9) -> Tensor:
    """Unit vectors along the last axis; zero stays zero."""
    return a / torch.sqrt(dot(a, a) + eps * eps).unsqueeze(-1)


def smoothstep(low: Tensor | float, high: Tensor | float, x: Tensor) -> Tensor:
    """0 below ``low``, 1 above ``high``, smooth between (``low`` > ``high`` turns it round)."""
    t = (x - low).div_(high - low).clamp_(0.0, 1.0)
    square = t * t
    return t.mul_(-2.0).add_(3.0).mul_(square)


def rotate_z(points: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
    """Turn ``[B, ..., 3]`` about the z axis by angles given as sine and cosine, ``[B]``."""
    shape = (-1,) + (1,) * (points.dim() - 2)
    s, c = sine.view(shape), cosine.view(shape)
    x, y, z = points.unbind(-1)
    return torch.stack((c * x - s * y, s * x + c * y, z), dim=-1)
