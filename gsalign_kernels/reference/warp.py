"""Warps in plain PyTorch: token maps by rotated control points, images by thin-plate splines."""

from __future__ import annotations

import torch
from torch import Tensor

from gsalign_kernels.reference import tps
from gsalign_kernels.reference.precision import without_autocast


def rotation(angle: Tensor) -> Tensor:
    """``[[cos, -sin], [sin, cos]]`` per angle: ``[B] -> [B, 2, 2]``."""
    cosine, sine = angle.cos(), angle.sin()
    return torch.stack([cosine, -sine, sine, cosine], dim=-1).unflatten(-1, (2, 2))


def rotated_grid(source_points: Tensor, angle: Tensor, basis: Tensor) -> Tensor:
    """``G_b = (M S) R(theta_b)^T``, where each output token reads its input: ``[B, H*W, 2]``."""
    with without_autocast(basis):
        return (basis @ source_points) @ rotation(angle).transpose(-1, -2)


def survivable(grid: Tensor, padding_mode: str) -> Tensor:
    """The grid with coordinates that crash PyTorch replaced by -1, where it reads for them.

    On the CPU the backward pass of ``grid_sample`` crashes (seen in PyTorch 2.11 and 2.14) at a
    NaN under border padding, and at what is not finite, or overflows times the size of the image,
    under reflection; forward it reads the first row or column.
    """
    if padding_mode == "zeros":
        return grid
    if padding_mode == "border":
        return grid.masked_fill(grid.isnan(), -1.0)
    largest = torch.finfo(grid.dtype).max * 2.0**-32
    return grid.masked_fill(~(grid.abs() <= largest), -1.0)


def warp_tokens(
    tokens: Tensor,
    source_points: Tensor,
    angle: Tensor,
    basis: Tensor,
    size: tuple[int, int],
    eta: float,
    prefix: int,
) -> Tensor:
    """``x + eta * bilinear(x, G_b)`` on the map tokens; the ``prefix`` tokens pass unchanged."""
    dtype = tps.computation_dtype(tokens)
    grid = rotated_grid(source_points.to(dtype), angle.to(dtype), basis.to(dtype))
    head, body = tokens[:, :prefix], tokens[:, prefix:].to(dtype)
    if tokens.shape[0] == 0 or tokens.shape[2] == 0:
        # grid_sample refuses empty channels; the sum keeps the graph connected.
        return tokens + (grid.sum() * 0).to(tokens.dtype)
    image = body.transpose(1, 2).unflatten(2, size)
    sampled = torch.nn.functional.grid_sample(
        image,
        survivable(grid, "border").unflatten(1, size),
        mode="bilinear",
        padding_mode="border",
        align_corners=True,
    )
    warped = body + eta * sampled.flatten(2).transpose(1, 2)
    return torch.cat([head, warped.to(tokens.dtype)], dim=1)


def warp_image(
    image: Tensor,
    coefficients: Tensor,
    control_points: Tensor,
    size: tuple[int, int],
    mode: str,
    padding_mode: str,
    align_corners: bool,
) -> Tensor:
    """Output pixel ``p`` reads the image at ``f(p)``: the spline maps output to input positions."""
    dtype = tps.computation_dtype(image)
    grid = tps.tps_grid(coefficients.to(dtype), control_points.to(dtype), size, align_corners)
    if image.shape[0] == 0 or image.shape[1] == 0:
        return image.new_zeros(image.shape[0], image.shape[1], *size) + 0 * image.sum()
    return torch.nn.functional.grid_sample(
        image.to(dtype),
        survivable(grid, padding_mode),
        mode=mode,
        padding_mode=padding_mode,
        align_corners=align_corners,
    ).to(image.dtype)
