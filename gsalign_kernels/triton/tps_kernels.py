"""Triton kernels that evaluate thin-plate splines, forward and backward; imports triton.

Columns come in pairs, since splines that place pixels have two; more columns mean more programs,
each with its own logarithms. Sums over points run within a program in order of the blocks, then
across its lanes, then over the programs in :func:`reduce_kernel`: no atomics, the same bits on
every run.
"""

# The decorator replaces the functions, so annotations would describe something else.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from gsalign_kernels.triton.common_kernels import (
    pixel_position,
    radial_basis,
    reduce_kernel,
    spline_pair,
)

__all__ = [
    "coefficients_backward_kernel",
    "evaluate_kernel",
    "points_backward_kernel",
    "reduce_kernel",
]

# Sizes of which a new value must not mean a new compilation.
SIZES = [
    "count",
    "width",
    "height",
    "points",
    "columns",
    "blocks",
    "chunks",
    "tiles",
    "pairs",
]


@triton.jit
def place(positions, sample, n, count, height, width, MAP: tl.constexpr, ALIGN: tl.constexpr):
    """Position of point ``n``: pixel ``n`` of a map, or what ``positions [B, count, 2]`` hold."""
    if MAP:
        dtype: tl.constexpr = positions.dtype.element_ty
        x = pixel_position(n % width, width, dtype, ALIGN)
        y = pixel_position(n // width, height, dtype, ALIGN)
    else:
        at = positions + 2 * (sample * count + n)
        x = tl.load(at, mask=n < count, other=0.0)
        y = tl.load(at + 1, mask=n < count, other=0.0)
    return x, y


@triton.jit(do_not_specialize=SIZES)
def evaluate_kernel(
    coefficients,
    control_points,
    positions,
    output,
    count,
    height,
    width,
    points,
    columns,
    blocks,
    pairs,
    MAP: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Two columns of a sample's spline at a block of points; ``positions`` give a map its type."""
    program = tl.program_id(0)
    block = program % blocks
    pair = program // blocks % pairs
    sample = (program // blocks // pairs).to(tl.int64)
    stride = columns.to(tl.int64)
    n = block * BLOCK_P + tl.arange(0, BLOCK_P)
    x, y = place(positions, sample, n, count, height, width, MAP, ALIGN)
    column = 2 * pair
    both = column + 1 < columns
    first, second = spline_pair(
        coefficients + sample * (points + 3) * stride,
        control_points + 2 * sample * points,
        x,
        y,
        points,
        stride,
        column,
        both,
    )
    target = output + (sample * count + n) * stride + column
    tl.store(target, first, mask=n < count)
    tl.store(target + 1, second, mask=(n < count) & both)


@triton.jit(do_not_specialize=SIZES)
def coefficients_backward_kernel(
    grad,
    coefficients,
    control_points,
    positions,
    coefficient_parts,
    point_parts,
    count,
    height,
    width,
    points,
    columns,
    chunks,
    tiles,
    pairs,
    MAP: tl.constexpr,
    ALIGN: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A chunk of points' share in the gradients of a tile of coefficients and control points.

    ``coefficient_parts [B, chunks, K + 3, columns]``, ``point_parts [B, chunks, pairs, K, 2]``.
    The affine terms 1, x, y follow the K radial ones as three more.
    """
    program = tl.program_id(0)
    chunk = program % chunks
    tile = program // chunks % tiles
    pair = program // chunks // tiles % pairs
    sample = (program // chunks // tiles // pairs).to(tl.int64)
    stride = columns.to(tl.int64)
    dtype: tl.constexpr = coefficients.dtype.element_ty
    column = 2 * pair
    both = column + 1 < columns
    k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    is_point = k < points
    centre = control_points + 2 * (sample * points + k)
    cx = tl.load(centre, mask=is_point, other=0.0)[:, None]
    cy = tl.load(centre + 1, mask=is_point, other=0.0)[:, None]
    weights = coefficients + (sample * (points + 3) + k) * stride + column
    first_weight = tl.load(weights, mask=is_point, other=0.0)[:, None]
    second_weight = tl.load(weights + 1, mask=is_point & both, other=0.0)[:, None]
    term = k[:, None]
    # Added up element by element and across lanes only once, at the end.
    by_first = tl.zeros((BLOCK_K, BLOCK_P), dtype)
    by_second = tl.zeros((BLOCK_K, BLOCK_P), dtype)
    by_x = tl.zeros((BLOCK_K, BLOCK_P), dtype)
    by_y = tl.zeros((BLOCK_K, BLOCK_P), dtype)
    start = chunk * CHUNK
    for begin in range(start, tl.minimum(start + CHUNK, count), BLOCK_P):
        n = begin + tl.arange(0, BLOCK_P)
        x, y = place(positions, sample, n, count, height, width, MAP, ALIGN)
        at = grad + (sample * count + n) * stride + column
        first = tl.load(at, mask=n < count, other=0.0)[None, :]
        second = tl.load(at + 1, mask=(n < count) & both, other=0.0)[None, :]
        x = x[None, :]
        y = y[None, :]
        dx = x - cx
        dy = y - cy
        value, slope = radial_basis(dx * dx + dy * dy)
        affine = tl.where(term == points, 1.0, tl.where(term == points + 1, x, y))
        value = tl.where(term < points, value, affine)
        by_first += value * first
        by_second += value * second
        # d U / d point = 2 slope (point - centre), and the opposite for the centre.
        pull = 2.0 * slope * (first * first_weight + second * second_weight)
        by_x -= pull * dx
        by_y -= pull * dy
    part = sample * chunks + chunk
    target = coefficient_parts + (part * (points + 3) + k) * stride + column
    is_term = k < points + 3
    tl.store(target, tl.sum(by_first, axis=1), mask=is_term)
    tl.store(target + 1, tl.sum(by_second, axis=1), mask=is_term & both)
    target = point_parts + 2 * ((part * pairs + pair) * points + k)
    tl.store(target, tl.sum(by_x, axis=1), mask=is_point)
    tl.store(target + 1, tl.sum(by_y, axis=1), mask=is_point)


@triton.jit(do_not_specialize=SIZES)
def points_backward_kernel(
    grad,
    coefficients,
    control_points,
    positions,
    grad_positions,
    count,
    points,
    columns,
    blocks,
    pairs,
    BLOCK_P: tl.constexpr,
):
    """Gradient of the points themselves, a block of them per program."""
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    stride = columns.to(tl.int64)
    n = program % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = n < count
    x, y = place(positions, sample, n, count, 1, 1, False, True)
    gx = tl.zeros_like(x)
    gy = tl.zeros_like(y)
    for pair in range(pairs):
        column = 2 * pair
        both = column + 1 < columns
        at = grad + (sample * count + n) * stride + column
        first = tl.load(at, mask=mask, other=0.0)
        second = tl.load(at + 1, mask=mask & both, other=0.0)
        weights = coefficients + sample * (points + 3) * stride + column
        affine = weights + (points + 1) * stride
        gx += tl.load(affine) * first + tl.load(affine + 1, mask=both, other=0.0) * second
        affine += stride
        gy += tl.load(affine) * first + tl.load(affine + 1, mask=both, other=0.0) * second
        for k in range(points):
            dx = x - tl.load(control_points + 2 * (sample * points + k))
            dy = y - tl.load(control_points + 2 * (sample * points + k) + 1)
            _, slope = radial_basis(dx * dx + dy * dy)
            pull = tl.load(weights + k * stride) * first
            pull += tl.load(weights + k * stride + 1, mask=both, other=0.0) * second
            pull *= 2.0 * slope
            gx += pull * dx
            gy += pull * dy
    target = grad_positions + 2 * (sample * count + n)
    tl.store(target, gx, mask=mask)
    tl.store(target + 1, gy, mask=mask)
