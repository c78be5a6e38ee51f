"""Control points of every image's own, beside those that the images of a batch share."""

from __future__ import annotations

import math

from torch import Tensor, nn

from gsalign.model.precision import promote, without_autocast

REACH = 0.25
"""How far a control point may move along each axis, over the distance of its neighbours.

Neighbours then keep half of their distance along the axis that parts them, and come to differ by no
more than that along the other. So any three corners of a cell of the grid keep their orientation:
points do not meet, sides do not cross, and a cell stays a convex quadrilateral. Beyond a quarter a
corner may pass the line between its two neighbours. All this is of points on the grid; the learned
ones, to which offsets are added, are free. The turn that follows changes none of it.
"""


class PointOffsets(nn.Linear):
    """What every image adds to its layer's control points: ``bound * tanh(FC(features))``.

    Starts at 0, so that a layer starts as without, and draws no random numbers, so that the rest of
    the network starts with the same weights as without.

    Args:
        features: number of the angle predictor's features.
        control_points: K = g * g, of a regular grid over [-1, 1]^2.

    Attributes:
        bound: of an offset along each axis, ``REACH`` of the grid's spacing ``2 / (g - 1)``.
    """

    def __init__(self, features: int, control_points: int) -> None:
        super().__init__(features, 2 * control_points)
        self.bound = REACH * 2 / (math.isqrt(control_points) - 1)

    def reset_parameters(self) -> None:
        """Zeros."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, features: Tensor) -> Tensor:
        """``[B, features] -> [B, K, 2]``, in units of [-1, 1]; float32 or float64."""
        with without_autocast(features):
            return (promote(super().forward(features)).tanh() * self.bound).unflatten(1, (-1, 2))
