"""What an image looks like through the warp of one layer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

import gsalign_kernels
from gsalign.model.ltps import LTPS, control_grid, rotated


def warped_images(
    ltps: LTPS, angle: Tensor, images: Tensor, offsets: Tensor | None = None
) -> Tensor:
    """Images read through a layer's spline, pixel by pixel where the layer reads patch by patch.

    The layer itself adds ``eta`` of what it reads to the tokens as they were.

    Args:
        ltps: of the layer.
        angle: ``[B]``, radians.
        images: ``[B, C, H, W]``, floating point, on the CPU; H and W whole multiples of the map's.
        offsets: ``[B, K, 2]``, what every image adds to the control points; None for nothing.

    Returns:
        Like ``images``; beyond the border its pixels go on.
    """
    (rows, columns), (height, width) = ltps.size, images.shape[2:]
    points = ltps.points(offsets).detach().double().cpu()
    if offsets is None:
        points = points.unsqueeze(0)
    control = control_grid(ltps.control_points)
    # To the spline ±1 are the centres of the outermost patches; pixels reach beyond.
    ys, xs = (_centres(pixels, cells) for pixels, cells in ((height, rows), (width, columns)))
    places = torch.stack(torch.meshgrid(ys, xs, indexing="ij")[::-1], dim=-1).flatten(0, 1)
    # By name: on the CPU this runs whichever kernels were chosen for the network.
    spline = gsalign_kernels.tps_solve(control, points, implementation="reference")
    plain = gsalign_kernels.tps_evaluate(spline, control, places, implementation="reference")
    read = rotated(plain, angle.double().cpu(), ltps.aspect)
    read = read.unflatten(1, (height, width))
    # To grid_sample ±1 are the edges of the image.
    inner = torch.tensor([(columns - 1) / columns, (rows - 1) / rows], dtype=torch.float64)
    return functional.grid_sample(
        images, (read * inner).to(images.dtype), padding_mode="border", align_corners=False
    )


def _centres(pixels: int, cells: int) -> Tensor:
    """Centres of pixels where -1 and 1 are the centres of the first and the last cell."""
    along = (torch.arange(pixels, dtype=torch.float64) + 0.5) * (cells / pixels) - 0.5
    return along / (cells - 1) * 2 - 1
