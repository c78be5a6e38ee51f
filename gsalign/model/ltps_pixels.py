"""The warp of LTPS with control points that differ from image to image: slower, and freer.

:func:`gsalign_kernels.warp_tokens` turns points that the batch shares, in [-1, 1] along both sides
of the map. On a map twice as high as wide such a turn shears what is in it; a rigid one moves the
points of every image in its own way.
"""

from __future__ import annotations

import torch
from torch import Tensor

import gsalign_kernels


def warp_tokens_by_points(
    tokens: Tensor,
    control_points: Tensor,
    values: Tensor,
    *,
    size: tuple[int, int],
    eta: float,
    prefix: int,
) -> Tensor:
    """As :func:`gsalign_kernels.warp_tokens`, but for where the control points read.

    The map is read by :func:`gsalign_kernels.warp_image` with the border padding and the
    ``align_corners=True`` of the fused operator. A spline is solved per image and what was read is
    stored, so it costs more time and memory.

    Args:
        tokens: ``[B, prefix + H*W, C]``: tokens that pass unchanged, then the map row by row.
        control_points: ``[K, 2]``, (x, y) in [-1, 1].
        values: ``[B, K, 2]``, where each of them reads.
        size: ``(H, W)`` of the map.
        eta: weight of the warped map.
        prefix: number of tokens before the map.

    Returns:
        Like ``tokens``.
    """
    head, body = tokens[:, :prefix], tokens[:, prefix:]
    read = gsalign_kernels.warp_image(
        body.transpose(1, 2).unflatten(2, size), control_points, values, padding_mode="border"
    )
    return torch.cat([head, body + eta * read.flatten(2).transpose(1, 2)], dim=1)
