"""Triton kernels of the image warp; the only file of it that imports triton.

Forward evaluates the spline and samples in one kernel, and stores no grid. Backward, one kernel
works out where every output pixel reads and the gradient by that position; a second gathers the
gradient of the image, each program for a tile of it, from the output tiles that read there. The
spline's gradients are then those of ``tps_grid``.

A position is computed once and kept for the gather: recomputing it wherever it might be needed
would cost a logarithm per control point each time, and two computations might round apart.
"""

# The decorator replaces the functions, so annotations would describe something else.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from gsalign_kernels.triton.common_kernels import OUTSIDE, pixel_position, sample_axis, spline_pair

__all__ = ["forward_kernel", "gather_kernel", "taps_kernel"]

# Sizes of which a new value must not mean a new compilation. The strides are not among them:
# knowing that one is 1, or that 16 divides it, gives wide accesses.
SIZES = [
    "channels",
    "height",
    "width",
    "out_height",
    "out_width",
    "points",
    "blocks",
    "groups",
    "tiles",
    "tile_columns",
    "in_tiles",
    "in_tile_columns",
]


@triton.jit
def reading_position(
    coefficients,
    control_points,
    sample,
    row,
    column,
    height,
    width,
    out_height,
    out_width,
    points,
    NEAREST: tl.constexpr,
    PADDING: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Where output pixels read: x and y in pixels, derivatives by the grid, whether finite."""
    gx, gy = spline_pair(
        coefficients + 2 * sample * (points + 3),
        control_points + 2 * sample * points,
        pixel_position(column, out_width, tl.float32, ALIGN),
        pixel_position(row, out_height, tl.float32, ALIGN),
        points,
        2,
        0,
        True,
    )
    x, slope_x, finite_x = sample_axis(gx, width, NEAREST, PADDING, ALIGN)
    y, slope_y, finite_y = sample_axis(gy, height, NEAREST, PADDING, ALIGN)
    return x, y, slope_x, slope_y, finite_x & finite_y


@triton.jit
def cell_of(position, size):
    """Pixels ``cell`` and ``cell + 1`` around a position, weight of the second, which exist."""
    floor = tl.floor(position)
    cell = floor.to(tl.int32)
    return cell, position - floor, (cell >= 0) & (cell < size), (cell >= -1) & (cell + 1 < size)


@triton.jit
def tap(plane, row, column, row_stride, column_stride, exists):
    """Values at one corner for channels x pixels; zero, and not read, where there is no pixel."""
    at = row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
    return tl.load(plane + at[None, :], mask=exists, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    image,
    coefficients,
    control_points,
    output,
    batch_stride,
    channel_stride,
    row_stride,
    column_stride,
    channels,
    height,
    width,
    out_height,
    out_width,
    points,
    blocks,
    groups,
    NEAREST: tl.constexpr,
    PADDING: tl.constexpr,
    ALIGN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A block of output pixels for a group of channels, which share one evaluation of the grid."""
    program = tl.program_id(0)
    block = program % blocks
    group = program // blocks % groups
    sample = (program // blocks // groups).to(tl.int64)
    pixels = out_height * out_width
    n = block * BLOCK_P + tl.arange(0, BLOCK_P)
    x, y, _, _, finite = reading_position(
        coefficients,
        control_points,
        sample,
        n // out_width,
        n % out_width,
        height,
        width,
        out_height,
        out_width,
        points,
        NEAREST,
        PADDING,
        ALIGN,
    )
    column, fx, left, right = cell_of(x, width)
    row, fy, up, down = cell_of(y, height)
    fx = fx[None, :]
    fy = fy[None, :]
    start = group * GROUP
    for first in range(start, tl.minimum(start + GROUP, channels), BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        plane = image + sample * batch_stride + (channel.to(tl.int64) * channel_stride)[:, None]
        mask = (channel < channels)[:, None] & (n < pixels)[None, :]
        at = mask & (left & up)[None, :]
        if NEAREST:
            sampled = tap(plane, row, column, row_stride, column_stride, at)
        else:
            sampled = (1 - fy) * (1 - fx) * tap(plane, row, column, row_stride, column_stride, at)
            at = mask & (right & up)[None, :]
            sampled += fx * (1 - fy) * tap(plane, row, column + 1, row_stride, column_stride, at)
            at = mask & (left & down)[None, :]
            sampled += (1 - fx) * fy * tap(plane, row + 1, column, row_stride, column_stride, at)
            at = mask & (right & down)[None, :]
            sampled += fx * fy * tap(plane, row + 1, column + 1, row_stride, column_stride, at)
            sampled = tl.where(finite[None, :], sampled, float("nan"))
        target = output + (sample * channels + channel)[:, None] * pixels + n[None, :]
        tl.store(target, sampled.to(output.dtype.element_ty), mask=mask)


SCANNED = tl.constexpr(128)
"""Output tiles whose boxes a program of the gather compares at once."""
NONE = tl.constexpr(1 << 30)


@triton.jit(do_not_specialize=SIZES)
def taps_kernel(
    grad,
    image,
    coefficients,
    control_points,
    positions,
    boxes,
    grad_grid,
    batch_stride,
    channel_stride,
    row_stride,
    column_stride,
    channels,
    height,
    width,
    out_height,
    out_width,
    points,
    tiles,
    tile_columns,
    NEAREST: tl.constexpr,
    PADDING: tl.constexpr,
    ALIGN: tl.constexpr,
    OUT_SIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Where the pixels of an output tile read, the box of pixels read, the gradient by the grid.

    ``positions [B, tiles, 2, OUT_SIDE^2]`` in pixels, x then y, ``OUTSIDE`` for what reads nothing;
    ``boxes [B, 4, tiles]``: first and last column, first and last row. The grid's gradient,
    ``[B, H, W, 2]``, is left out when ``NEAREST``, where it is zero.
    """
    program = tl.program_id(0)
    tile = program % tiles
    sample = (program // tiles).to(tl.int64)
    OUT_TILE: tl.constexpr = OUT_SIDE * OUT_SIDE
    lane = tl.arange(0, OUT_TILE)
    row = tile // tile_columns * OUT_SIDE + lane // OUT_SIDE
    column = tile % tile_columns * OUT_SIDE + lane % OUT_SIDE
    exists = (row < out_height) & (column < out_width)
    x, y, slope_x, slope_y, _ = reading_position(
        coefficients,
        control_points,
        sample,
        row,
        column,
        height,
        width,
        out_height,
        out_width,
        points,
        NEAREST,
        PADDING,
        ALIGN,
    )
    reads = exists & (x != OUTSIDE) & (y != OUTSIDE)
    target = positions + 2 * OUT_TILE * (sample * tiles + tile) + lane
    tl.store(target, tl.where(reads, x, OUTSIDE))
    tl.store(target + OUT_TILE, tl.where(reads, y, OUTSIDE))
    read_column, fx, left, right = cell_of(x, width)
    read_row, fy, up, down = cell_of(y, height)
    box = boxes + 4 * sample * tiles + tile
    tl.store(box, tl.min(tl.where(reads, read_column, NONE), axis=0))
    tl.store(box + tiles, tl.max(tl.where(reads, read_column + 1, -NONE), axis=0))
    tl.store(box + 2 * tiles, tl.min(tl.where(reads, read_row, NONE), axis=0))
    tl.store(box + 3 * tiles, tl.max(tl.where(reads, read_row + 1, -NONE), axis=0))
    if not NEAREST:
        pixels = out_height * out_width
        n = row * out_width + column
        fx = fx[None, :]
        fy = fy[None, :]
        by_x = tl.zeros((BLOCK_C, OUT_TILE), tl.float32)
        by_y = tl.zeros((BLOCK_C, OUT_TILE), tl.float32)
        for first in range(0, channels, BLOCK_C):
            channel = first + tl.arange(0, BLOCK_C)
            mask = (channel < channels)[:, None] & reads[None, :]
            source = grad + (sample * channels + channel)[:, None] * pixels + n[None, :]
            upstream = tl.load(source, mask=mask, other=0.0).to(tl.float32)
            plane = image + sample * batch_stride + (channel.to(tl.int64) * channel_stride)[:, None]
            at = mask & (left & up)[None, :]
            x00 = tap(plane, read_row, read_column, row_stride, column_stride, at)
            at = mask & (right & up)[None, :]
            x01 = tap(plane, read_row, read_column + 1, row_stride, column_stride, at)
            at = mask & (left & down)[None, :]
            x10 = tap(plane, read_row + 1, read_column, row_stride, column_stride, at)
            at = mask & (right & down)[None, :]
            x11 = tap(plane, read_row + 1, read_column + 1, row_stride, column_stride, at)
            by_x += upstream * ((1 - fy) * (x01 - x00) + fy * (x11 - x10))
            by_y += upstream * ((1 - fx) * (x10 - x00) + fx * (x11 - x01))
        # Where the position cannot move there is no gradient, whatever the image holds.
        gx = tl.where(slope_x != 0.0, slope_x * tl.sum(by_x, axis=0), 0.0)
        gy = tl.where(slope_y != 0.0, slope_y * tl.sum(by_y, axis=0), 0.0)
        target = grad_grid + 2 * (sample * pixels + n)
        tl.store(target, gx, mask=exists)
        tl.store(target + 1, gy, mask=exists)


@triton.jit(do_not_specialize=SIZES)
def gather_kernel(
    grad,
    positions,
    boxes,
    grad_image,
    channels,
    height,
    width,
    out_height,
    out_width,
    tiles,
    tile_columns,
    in_tiles,
    in_tile_columns,
    groups,
    OUT_SIDE: tl.constexpr,
    IN_SIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradient of a tile of the image: output tiles in order, their pixels in order.

    An output pixel that reads at ``(x, y)`` weighs ``(1 - |x - column|)(1 - |y - row|)`` at an
    image pixel less than one away on both axes; a position rounded to a pixel weighs 1 there.
    """
    program = tl.program_id(0)
    in_tile = program % in_tiles
    group = program // in_tiles % groups
    sample = (program // in_tiles // groups).to(tl.int64)
    top = in_tile // in_tile_columns * IN_SIDE
    left = in_tile % in_tile_columns * IN_SIDE
    OUT_TILE: tl.constexpr = OUT_SIDE * OUT_SIDE
    IN_TILE: tl.constexpr = IN_SIDE * IN_SIDE
    lane = tl.arange(0, IN_TILE)
    row = top + lane // IN_SIDE
    column = left + lane % IN_SIDE
    y = row.to(tl.float32)
    x = column.to(tl.float32)
    channel = group * BLOCK_C + tl.arange(0, BLOCK_C)
    in_group = channel < channels
    source = grad + (sample * channels + channel) * (out_height * out_width)
    collected = tl.zeros((BLOCK_C, IN_TILE), tl.float32)
    # A position reads here when it is less than REACH from the tile's centre on both axes.
    REACH: tl.constexpr = (IN_SIDE + 1) * 0.5
    centre_x = left + (REACH - 1.0)
    centre_y = top + (REACH - 1.0)
    boxes += 4 * sample * tiles
    positions += 2 * OUT_TILE * sample * tiles
    for first in range(0, tiles, SCANNED):
        scanned = first + tl.arange(0, SCANNED)
        known = scanned < tiles
        box = boxes + scanned
        hit = tl.load(box, mask=known, other=NONE) < left + IN_SIDE
        hit = hit & (tl.load(box + tiles, mask=known, other=-NONE) >= left)
        hit = hit & (tl.load(box + 2 * tiles, mask=known, other=NONE) < top + IN_SIDE)
        hit = hit & (tl.load(box + 3 * tiles, mask=known, other=-NONE) >= top)
        waiting = tl.where(hit, scanned, NONE)
        tile = tl.min(waiting, axis=0)
        while tile < NONE:
            read_at = positions + 2 * OUT_TILE * tile.to(tl.int64)
            pixel = tile // tile_columns * OUT_SIDE * out_width + tile % tile_columns * OUT_SIDE
            for i in range(OUT_TILE):
                px = tl.load(read_at + i)
                py = tl.load(read_at + OUT_TILE + i)
                if (tl.abs(px - centre_x) < REACH) & (tl.abs(py - centre_y) < REACH):
                    weight = tl.maximum(1.0 - tl.abs(px - x), 0.0)
                    weight *= tl.maximum(1.0 - tl.abs(py - y), 0.0)
                    at = source + pixel + i // OUT_SIDE * out_width + i % OUT_SIDE
                    upstream = tl.load(at, mask=in_group, other=0.0).to(tl.float32)
                    # An infinite gradient reaches the pixels that were read, and no others.
                    share = weight[None, :] * upstream[:, None]
                    collected += tl.where((weight > 0.0)[None, :], share, 0.0)
            waiting = tl.where(waiting == tile, NONE, waiting)
            tile = tl.min(waiting, axis=0)
    target = grad_image + (sample * channels + channel)[:, None] * height.to(tl.int64) * width
    target += (row * width + column)[None, :]
    mask = in_group[:, None] & ((row < height) & (column < width))[None, :]
    tl.store(target, collected.to(grad_image.dtype.element_ty), mask=mask)
