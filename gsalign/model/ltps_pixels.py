"""The warp of LTPS with control points that differ from image to image: slower, and freer.

:func:`gsalign_kernels.warp_tokens` turns points that the batch shares, in [-1, 1] along both sides
of the map. On a map twice as high as wide such a turn shears what is in it; a rigid one moves the
points of every image in its own way, and so do offsets of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

import gsalign_kernels
from gsalign.model.precision import without_autocast
from gsalign_kernels.compat import warp_image_tps


def unit_splines(control_points: Tensor) -> Tensor:
    """Coefficients of the splines that are 1 at one control point and 0 at the others.

    A spline is linear in what it is at its control points, so that these, a constant of a regular
    grid, make any other without solving again.

    Args:
        control_points: ``[K, 2]`` float64 on the CPU.

    Returns:
        ``[K + 3, K]`` float64: K weights, then constant, x and y.
    """
    values = torch.eye(len(control_points), dtype=torch.float64, device="cpu").unsqueeze(0)
    # Whatever kernels are asked for: they are for the tokens' device, and this is on the CPU.
    return gsalign_kernels.tps_solve(control_points, values, implementation="auto")[0]


def warp_tokens_by_points(
    tokens: Tensor,
    control_points: Tensor,
    splines: Tensor,
    values: Tensor,
    *,
    size: tuple[int, int],
    eta: float,
    prefix: int,
) -> Tensor:
    """As :func:`gsalign_kernels.warp_tokens`, but for where the control points read.

    The map is read by the fused operator for images, with the border padding and the
    ``align_corners=True`` of that for tokens; what was read is stored.

    Args:
        tokens: ``[B, prefix + H*W, C]``: tokens that pass unchanged, then the map row by row.
        control_points: ``[K, 2]``, (x, y) in [-1, 1].
        splines: ``[K + 3, K]`` of :func:`unit_splines`, as the control points in the type that
            positions are computed in.
        values: ``[B, K, 2]``, where each control point reads.
        size: ``(H, W)`` of the map.
        eta: weight of the warped map.
        prefix: number of tokens before the map.

    Returns:
        Like ``tokens``.
    """
    with without_autocast(tokens):
        coefficients = splines @ values
    count = len(control_points)
    head, body = tokens[:, :prefix], tokens[:, prefix:]
    read = warp_image_tps(
        body.transpose(1, 2).unflatten(2, size),
        control_points.unsqueeze(0),
        coefficients[:, :count],
        coefficients[:, count:],
        align_corners=True,
        padding_mode="border",
    )
    return torch.cat([head, body + eta * read.flatten(2).transpose(1, 2)], dim=1)
