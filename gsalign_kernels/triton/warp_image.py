"""Image warp in Triton: the operators ``gsalign_triton::warp_image`` and its backward pass."""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gsalign_kernels.triton.launch import (
    ceil_div,
    check_available,
    check_like,
    checked_grid,
    device_of,
    empty_output,
    power_of_two,
)
from gsalign_kernels.triton.tps import evaluate_backward

MAX_PIXELS = 1 << 30
"""Most pixels of an image, in or out: their number and that of a tile more have 32 bits."""

CHANNEL_GROUP = 32
"""Channels that share one evaluation of the grid in the forward pass."""

OUT_SIDE, IN_SIDE = 8, 16
"""Sides of the backward pass's tiles of the output and of the image."""

_NEAREST = 1
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@lru_cache(maxsize=1)
def _kernels() -> Any:
    return importlib.import_module("gsalign_kernels.triton.warp_image_kernels")


def _check(
    image: Tensor,
    coefficients: Tensor,
    control_points: Tensor,
    size: tuple[int, int],
    mode: int,
    padding_mode: int,
) -> None:
    check_available("warp_image", image)
    if image.dtype not in _DTYPES:
        raise TypeError(
            f"image: triton takes float32, float16 and bfloat16, got {image.dtype}; "
            'use implementation="reference"'
        )
    if image.dim() != 4 or image.shape[2] < 1 or image.shape[3] < 1:
        raise ValueError(f"image: wanted [B, C, H, W] with pixels, got {tuple(image.shape)}")
    if size[0] < 1 or size[1] < 1:
        raise ValueError(f"size: wanted positive lengths, got {size[0]} x {size[1]}")
    for name, (height, width) in (("image", image.shape[2:]), ("size", size)):
        # Tiles at the edges reach beyond it.
        if (height + IN_SIDE) * (width + IN_SIDE) > MAX_PIXELS:
            raise ValueError(
                f"{name}: wanted at most {MAX_PIXELS} pixels, edges of {IN_SIDE} included, "
                f"got {height} x {width}"
            )
    if mode not in (0, 1):
        raise ValueError(f"mode: wanted 0 or 1, got {mode}")
    if padding_mode not in (0, 1, 2):
        raise ValueError(f"padding_mode: wanted 0, 1 or 2, got {padding_mode}")
    if control_points.dim() != 3:
        raise ValueError(f"control_points: wanted [B, K, 2], got {tuple(control_points.shape)}")
    batch, points = image.shape[0], control_points.shape[1]
    like = torch.empty(0, dtype=torch.float32, device=image.device)
    check_like("control_points", control_points, (batch, points, 2), like)
    check_like("coefficients", coefficients, (batch, points + 3, 2), like)


@torch.library.custom_op(
    "gsalign_triton::warp_image",
    mutates_args=(),
    schema="(Tensor image, Tensor coefficients, Tensor control_points, int height, int width,"
    " int mode, int padding_mode, bool align_corners) -> Tensor",
)
def warp_image(
    image: Tensor,
    coefficients: Tensor,
    control_points: Tensor,
    height: int,
    width: int,
    mode: int,
    padding_mode: int,
    align_corners: bool,
) -> Tensor:
    """Output pixel ``p`` reads the image at the spline's value there, as ``grid_sample`` does.

    Args:
        image: ``[B, C, H, W]``, float32, float16 or bfloat16, any strides.
        coefficients: ``[B, K+3, 2]`` float32, from ``tps_solve``.
        control_points: ``[B, K, 2]`` float32, the ones solved with.
        height: of the output.
        width: of the output.
        mode: 0 bilinear, 1 nearest.
        padding_mode: 0 zeros, 1 border, 2 reflection.
        align_corners: whether -1 and 1 mean the centres of the corner pixels or their edges.

    Returns:
        ``[B, C, height, width]`` in the type of ``image``, contiguous.
    """
    _check(image, coefficients, control_points, (height, width), mode, padding_mode)
    coefficients, control_points = coefficients.contiguous(), control_points.contiguous()
    batch, channels, in_height, in_width = image.shape
    output = empty_output(image, (batch, channels, height, width))
    if output.numel() == 0:
        return output.to(image.dtype)
    block = power_of_two(height * width, 32, 128)
    blocks, groups = ceil_div(height * width, block), ceil_div(channels, CHANNEL_GROUP)
    with device_of(image):
        _kernels().forward_kernel[checked_grid("warp_image", batch * blocks * groups)](
            image,
            coefficients,
            control_points,
            output,
            *image.stride(),
            channels,
            in_height,
            in_width,
            height,
            width,
            control_points.shape[1],
            blocks,
            groups,
            NEAREST=mode == _NEAREST,
            PADDING=padding_mode,
            ALIGN=align_corners,
            GROUP=CHANNEL_GROUP,
            BLOCK_P=block,
            BLOCK_C=power_of_two(channels, 1, 4),
            num_warps=block // 32,
        )
    return output.to(image.dtype)


@torch.library.custom_op(
    "gsalign_triton::warp_image_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor image, Tensor coefficients, Tensor control_points, int mode,"
    " int padding_mode, bool align_corners) -> (Tensor, Tensor, Tensor)",
)
def warp_image_backward(
    grad: Tensor,
    image: Tensor,
    coefficients: Tensor,
    control_points: Tensor,
    mode: int,
    padding_mode: int,
    align_corners: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of image, coefficients and control points; the same bits on every run."""
    if grad.dim() != 4:
        raise ValueError(f"grad: wanted [B, C, H, W], got {tuple(grad.shape)}")
    size = (grad.shape[2], grad.shape[3])
    _check(image, coefficients, control_points, size, mode, padding_mode)
    batch, channels, height, width = image.shape
    check_like("grad", grad, (batch, channels, *size), image)
    grad, coefficients, control_points = (
        t.contiguous() for t in (grad, coefficients, control_points)
    )
    grad_image = empty_output(image, image.shape)
    if grad.numel() == 0:
        return (
            image.new_empty(image.shape),
            torch.zeros_like(coefficients),
            torch.zeros_like(control_points),
        )
    tile_columns = ceil_div(size[1], OUT_SIDE)
    tiles = ceil_div(size[0], OUT_SIDE) * tile_columns
    in_tile_columns = ceil_div(width, IN_SIDE)
    in_tiles = ceil_div(height, IN_SIDE) * in_tile_columns
    positions = coefficients.new_empty((batch, tiles, 2, OUT_SIDE * OUT_SIDE))
    boxes = torch.empty((batch, 4, tiles), dtype=torch.int32, device=image.device)
    nearest = mode == _NEAREST
    grad_grid = coefficients.new_empty((0 if nearest else batch, size[0] * size[1], 2))
    block_c = power_of_two(channels, 1, 8)
    groups = ceil_div(channels, block_c)
    kernels = _kernels()
    with device_of(image):
        kernels.taps_kernel[checked_grid("warp_image", batch * tiles)](
            grad,
            image,
            coefficients,
            control_points,
            positions,
            boxes,
            grad_grid,
            *image.stride(),
            channels,
            height,
            width,
            *size,
            control_points.shape[1],
            tiles,
            tile_columns,
            NEAREST=nearest,
            PADDING=padding_mode,
            ALIGN=align_corners,
            OUT_SIDE=OUT_SIDE,
            BLOCK_C=power_of_two(channels, 1, 4),
            num_warps=2,
        )
        kernels.gather_kernel[checked_grid("warp_image", batch * in_tiles * groups)](
            grad,
            positions,
            boxes,
            grad_image,
            channels,
            height,
            width,
            *size,
            tiles,
            tile_columns,
            in_tiles,
            in_tile_columns,
            groups,
            OUT_SIDE=OUT_SIDE,
            IN_SIDE=IN_SIDE,
            BLOCK_C=block_c,
            num_warps=4,
        )
    grad_image = grad_image.to(image.dtype)
    if nearest:
        return grad_image, torch.zeros_like(coefficients), torch.zeros_like(control_points)
    return grad_image, *evaluate_backward(
        "warp_image", grad_grid, coefficients, control_points, None, size, align_corners
    )
