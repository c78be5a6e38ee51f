"""An angle over the full circle from two numbers, with a gradient that is bounded everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

SOFTENING = 1e-4
"""Added to the squared length in the gradient, which is then at most 50 radians per unit."""


def angle_of(vectors: Tensor) -> Tensor:
    """The angle of every vector, as ``atan2`` has it.

    The derivative of ``atan2`` is the vector, turned by a right angle, over its squared length:
    infinite, and NaN in PyTorch, at 0. Here a constant is added to that square, which changes
    nothing to speak of for vectors near length 1; at 0 the angle is 0 and so is its gradient.

    Args:
        vectors: ``[..., 2]``, (x, y), of any length.

    Returns:
        ``[...]``, radians in [-pi, pi].
    """
    x, y = vectors.unbind(dim=-1)
    fixed_x, fixed_y = x.detach(), y.detach()
    rise = (fixed_x * y - fixed_y * x) / (fixed_x.square() + fixed_y.square() + SOFTENING)
    # The second term is exactly 0: it brings the gradient alone.
    return torch.atan2(fixed_y, fixed_x) + (rise - rise.detach())
