"""Device functions that several Triton kernels share, and the one reduction they all end in.

The arithmetic is that of ``csrc/tps/tps.h`` and ``csrc/warp/sample.h``. Imports triton.
"""

# The decorator replaces the functions, so annotations would describe something else.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def radial_basis(squared_distance):
    """``U(r2) = r2/2 log(max(r2, 1e-8))`` and its derivative by ``r2``.

    Written so that a NaN stays one: it must not look like a distance of zero.
    """
    below = squared_distance < 1e-8
    half_log = 0.5 * tl.log(tl.where(below, 1e-8, squared_distance))
    return squared_distance * half_log, half_log + tl.where(below, 0.0, 0.5)


@triton.jit
def divide(numerator, denominator, DTYPE: tl.constexpr):
    """Division rounded to nearest; ``/`` alone rounds float32 less well."""
    if DTYPE == tl.float64:
        return numerator / denominator
    else:
        return tl.div_rn(numerator, denominator)


@triton.jit
def pixel_position(index, length, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    """Position of pixel ``index`` of ``length`` in [-1, 1], in float32 or float64."""
    if ALIGN:
        return index.to(DTYPE) * divide(2.0, tl.maximum(length - 1, 1).to(DTYPE), DTYPE) - 1.0
    else:
        # Divided, not multiplied by an inverse, for the centre of an odd length to lie at 0.
        return divide((2 * index + 1).to(DTYPE), length.to(DTYPE), DTYPE) - 1.0


@triton.jit
def spline_pair(weights, control_points, x, y, points, columns, column, both):
    """Columns ``column`` and, if ``both``, ``column + 1`` of one sample's spline at ``(x, y)``.

    ``weights`` points at the sample's ``[K + 3, columns]``, ``control_points`` at its ``[K, 2]``.
    The sum over control points runs in order.
    """
    at = weights + column
    affine = at + points * columns
    first = tl.load(affine) + tl.load(affine + columns) * x + tl.load(affine + 2 * columns) * y
    second = (
        tl.load(affine + 1, mask=both, other=0.0)
        + tl.load(affine + columns + 1, mask=both, other=0.0) * x
        + tl.load(affine + 2 * columns + 1, mask=both, other=0.0) * y
    )
    for k in range(points):
        dx = x - tl.load(control_points + 2 * k)
        dy = y - tl.load(control_points + 2 * k + 1)
        value, _ = radial_basis(dx * dx + dy * dy)
        first += tl.load(at + k * columns) * value
        second += tl.load(at + k * columns + 1, mask=both, other=0.0) * value
    return first, second


# Padding modes, as the operators number them.
ZEROS = tl.constexpr(0)
REFLECTION = tl.constexpr(2)

OUTSIDE = tl.constexpr(-4.0)
"""A position that is more than a pixel away from every pixel."""


@triton.jit
def sample_axis(
    coordinate, size, NEAREST: tl.constexpr, PADDING: tl.constexpr, ALIGN: tl.constexpr
):
    """One axis of ``grid_sample``: position in pixels, its derivative, whether it is finite.

    A position is rounded to a pixel when ``NEAREST``, and ``OUTSIDE`` when nothing can be read
    there, so that it always converts to an integer.
    """
    extent = size.to(tl.float32)
    if ALIGN:
        position = (coordinate + 1.0) * 0.5 * (extent - 1.0)
        slope = tl.zeros_like(position) + (extent - 1.0) * 0.5
    else:
        position = ((coordinate + 1.0) * extent - 1.0) * 0.5
        slope = tl.zeros_like(position) + extent * 0.5
    if PADDING == REFLECTION:
        # About the centres (ALIGN) or the outer edges of the first and last pixel.
        low: tl.constexpr = 0.0 if ALIGN else -0.5
        span = extent - 1.0 if ALIGN else extent
        offset = position - low
        slope = tl.where(offset < 0.0, -slope, slope)
        distance = tl.abs(offset)
        turns = tl.floor(distance / span)
        extra = distance - turns * span
        even = turns - 2.0 * tl.floor(turns * 0.5) == 0.0
        # A span of 0 makes this NaN, which the clamp below takes to the only pixel.
        position = tl.where(even, extra, span - extra) + low
        slope = tl.where(even, slope, -slope)
    if PADDING != ZEROS:
        last = extent - 1.0
        above = position > 0.0  # false for NaN
        below = position < last
        slope = tl.where(above & below, slope, 0.0)
        position = tl.where(above, tl.where(below, position, last), 0.0)
    # Not position - position == 0: a product fused into that subtraction leaves its rounding error.
    finite = tl.abs(position) < float("inf")
    inside = finite & (position >= -2.0) & (position <= extent + 1.0)
    position = tl.where(inside, position, OUTSIDE)
    slope = tl.where(inside, slope, 0.0)
    if NEAREST:
        # Ties go to the even pixel.
        floor = tl.floor(position)
        over = position - floor
        odd = floor - 2.0 * tl.floor(floor * 0.5) != 0.0
        position = floor + tl.where((over > 0.5) | ((over == 0.5) & odd), 1.0, 0.0)
    return position, slope, finite


# Sizes of which a new value must not mean a new compilation.
SIZES = ["count", "columns", "column_blocks"]


@triton.jit(do_not_specialize=SIZES)
def reduce_kernel(
    parts,
    output,
    count,
    columns,
    column_blocks,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum of ``parts [samples, count, columns]`` over the parts, in a fixed order."""
    program = tl.program_id(0)
    sample = (program // column_blocks).to(tl.int64)
    column = program % column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), parts.dtype.element_ty)
    for first in range(0, count, BLOCK_R):
        part = first + tl.arange(0, BLOCK_R)
        values = tl.load(
            parts + (sample * count + part)[:, None] * columns + column[None, :],
            mask=(part < count)[:, None] & (column < columns)[None, :],
            other=0.0,
        )
        total += tl.sum(values, axis=0)
    tl.store(output + sample * columns + column, total, mask=column < columns)
