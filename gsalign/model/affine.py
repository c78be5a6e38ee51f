"""Images read through affine maps, by the operator that reads them through splines."""

from __future__ import annotations

import torch
from torch import Tensor

from gsalign_kernels.compat import warp_image_tps


def read_affine(
    images: Tensor,
    slopes: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    mode: str = "bilinear",
    padding_mode: str = "border",
) -> Tensor:
    """Read every image through a linear map of its own, about its middle.

    Output pixel (X, Y) in [-1, 1] (``align_corners=False``) reads at ``(a X + b Y, c X + d Y)``.

    Args:
        images: ``[B, C, H, W]``.
        slopes: a, b, c and d, each ``[B]``; gradients flow into them.
        mode: ``"bilinear"`` or ``"nearest"``.
        padding_mode: what is read beyond the border: as ``"border"`` its pixels go on.

    Returns:
        Like ``images``.
    """
    a, b, c, d = slopes
    # A spline without bends: its constant and its slopes are known, nothing to be solved.
    nothing = torch.zeros_like(a)
    affine = torch.stack([nothing, nothing, a, c, b, d], dim=1).unflatten(1, (3, 2))
    none = a.new_zeros(1, 3, 2)
    return warp_image_tps(
        images, none, none, affine, align_corners=False, padding_mode=padding_mode, mode=mode
    )
