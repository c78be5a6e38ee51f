"""Triton kernels of the token warp; the only file of it that imports triton.

The method is that of ``csrc/warp/warp_kernels.cuh``: a four-tap gather forward, and backward a
gather through lists of queries sorted by the cell they read, so that nothing is added atomically
and every run gives the same bits. What differs: tiles are read through the caches, and the lists
are made once per sample by two small kernels instead of in every block.

Cells and fractions are computed once and stored, never twice: two computations of one coordinate
might round apart and put a query into two cells.
"""

# The decorator replaces the functions, so annotations would describe something else.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from gsalign_kernels.triton.common_kernels import reduce_kernel

__all__ = [
    "backward_kernel",
    "forward_kernel",
    "project_kernel",
    "reduce_kernel",
    "sort_kernel",
    "taps_kernel",
]

# Sizes of which a new value must not mean a new compilation. The number of channels is not among
# them: knowing that 16 divides it gives 16-byte accesses.
SIZES = [
    "height",
    "width",
    "prefix",
    "points",
    "blocks",
    "tiles",
    "queries",
]


@triton.jit
def clamp_axis(coordinate, size):
    """Cell, fraction, whether cell + 1 exists, and whether the axis is free; border padding.

    A NaN compares false and so reads cell 0; clamped coordinates have no gradient.
    """
    last = (size - 1) * 1.0
    position = (coordinate + 1.0) * 0.5 * last
    above = position > 0.0
    below = position < last
    free = above & below
    cell = tl.where(free, position, tl.where(above, last, 0.0)).to(tl.int32)
    fraction = tl.where(free, position - cell.to(tl.float32), 0.0)
    return cell, fraction, cell + 1 < size, free


@triton.jit
def rotated_points(source_points, angle, basis, sample, query, mask, points):
    """``G_b[query] = R(angle_b) (M S)[query]``; the sum over control points runs in order."""
    x = tl.zeros_like(query).to(tl.float32)
    y = tl.zeros_like(query).to(tl.float32)
    for k in range(points):
        m = tl.load(basis + query.to(tl.int64) * points + k, mask=mask, other=0.0)
        x += m * tl.load(source_points + 2 * k)
        y += m * tl.load(source_points + 2 * k + 1)
    theta = tl.load(angle + sample)
    cosine = tl.cos(theta)
    sine = tl.sin(theta)
    return x * cosine - y * sine, x * sine + y * cosine


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    tokens,
    source_points,
    angle,
    basis,
    output,
    eta,
    height,
    width,
    prefix,
    channels,
    points,
    blocks,
    tiles,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Output of a block of queries and a tile of channels; the first block copies the prefix."""
    program = tl.program_id(0)
    block = program % blocks
    tile = program // blocks % tiles
    sample = (program // blocks // tiles).to(tl.int64)
    queries = height * width
    query = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    channel = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    in_map = query < queries
    in_row = channel < channels
    start = sample * (prefix + queries) * channels
    if block == 0:
        for row in range(prefix):
            at = start + tl.cast(row, tl.int64) * channels + channel
            tl.store(output + at, tl.load(tokens + at, mask=in_row), mask=in_row)

    x, y = rotated_points(source_points, angle, basis, sample, query, in_map, points)
    column, fx, right, _ = clamp_axis(x, width)
    row, fy, down, _ = clamp_axis(y, height)
    corner = start + (prefix + row * width + column).to(tl.int64) * channels
    at = corner[:, None] + channel[None, :]
    mask = in_map[:, None] & in_row[None, :]
    right = mask & right[:, None]
    down = mask & down[:, None]
    below = width.to(tl.int64) * channels
    fx = fx[:, None]
    fy = fy[:, None]
    sampled = (1 - fy) * (1 - fx) * tl.load(tokens + at, mask=mask, other=0.0).to(tl.float32)
    sampled += (1 - fy) * fx * tl.load(tokens + at + channels, mask=right, other=0.0).to(tl.float32)
    sampled += fy * (1 - fx) * tl.load(tokens + at + below, mask=down, other=0.0).to(tl.float32)
    both = right & down
    diagonal = tl.load(tokens + at + below + channels, mask=both, other=0.0).to(tl.float32)
    sampled += fy * fx * diagonal
    own = start + (prefix + query).to(tl.int64)[:, None] * channels + channel[None, :]
    result = tl.load(tokens + own, mask=mask, other=0.0).to(tl.float32) + eta * sampled
    tl.store(output + own, result.to(output.dtype.element_ty), mask=mask)


# Flags packed above the cell, which is below 2**24.
RIGHT = tl.constexpr(1 << 24)
DOWN = tl.constexpr(1 << 25)
FREE_X = tl.constexpr(1 << 26)
FREE_Y = tl.constexpr(1 << 27)


@triton.jit(do_not_specialize=SIZES)
def taps_kernel(
    source_points,
    angle,
    basis,
    cells,
    fractions,
    height,
    width,
    points,
    blocks,
    BLOCK_Q: tl.constexpr,
):
    """Where each query reads: ``cells [B, HW]`` with flags, ``fractions [B, HW, 2]``."""
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    queries = height * width
    query = program % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    mask = query < queries
    x, y = rotated_points(source_points, angle, basis, sample, query, mask, points)
    column, fx, right, free_x = clamp_axis(x, width)
    row, fy, down, free_y = clamp_axis(y, height)
    packed = row * width + column
    packed += tl.where(right, RIGHT, 0) + tl.where(down, DOWN, 0)
    packed += tl.where(free_x, FREE_X, 0) + tl.where(free_y, FREE_Y, 0)
    at = sample * queries + query
    tl.store(cells + at, packed, mask=mask)
    tl.store(fractions + 2 * at, fx, mask=mask)
    tl.store(fractions + 2 * at + 1, fy, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def sort_kernel(
    cells,
    fractions,
    readers,
    reader_fractions,
    bounds,
    queries,
    blocks,
    BLOCK_Q: tl.constexpr,
):
    """Lists of queries by the cell they read, in order of the query within a cell.

    A query's place is the number of queries before it in that order; ``bounds[c]`` is the number
    of queries in cells before ``c``. Counting by comparison costs HW^2 per sample, and no order of
    execution can change it.
    """
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    query = program % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    mask = query < queries
    start = sample * queries
    cell = tl.load(cells + start + query, mask=mask, other=0) & (RIGHT - 1)
    place = tl.zeros((BLOCK_Q,), tl.int32)
    bound = tl.zeros((BLOCK_Q,), tl.int32)
    for first in range(0, queries, BLOCK_Q):
        other = first + tl.arange(0, BLOCK_Q)
        theirs = tl.load(cells + start + other, mask=other < queries, other=RIGHT - 1)
        theirs = (theirs & (RIGHT - 1))[None, :]
        before = (theirs < cell[:, None]) | (
            (theirs == cell[:, None]) & (other[None, :] < query[:, None])
        )
        place += tl.sum(before.to(tl.int32), axis=1)
        bound += tl.sum((theirs < query[:, None]).to(tl.int32), axis=1)
    fx = tl.load(fractions + 2 * (start + query), mask=mask)
    fy = tl.load(fractions + 2 * (start + query) + 1, mask=mask)
    tl.store(readers + start + place, query, mask=mask)
    tl.store(reader_fractions + 2 * (start + place), fx, mask=mask)
    tl.store(reader_fractions + 2 * (start + place) + 1, fy, mask=mask)
    tl.store(bounds + sample * (queries + 1) + query, bound, mask=query <= queries)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    grad,
    tokens,
    cells,
    fractions,
    readers,
    reader_fractions,
    bounds,
    grad_tokens,
    grad_positions,
    eta,
    height,
    width,
    prefix,
    channels,
    blocks,
    tiles,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Token gradients of a block of the map and a tile of channels, and the tile's share of more.

    That share is of the gradient by reading position, ``grad_positions [B, tiles, HW, 2]``.
    """
    program = tl.program_id(0)
    block = program % blocks
    tile = program // blocks % tiles
    sample = (program // blocks // tiles).to(tl.int64)
    queries = height * width
    query = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    channel = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    in_map = query < queries
    in_row = channel < channels
    mask = in_map[:, None] & in_row[None, :]
    start = sample * (prefix + queries) * channels
    if block == 0:
        for row in range(prefix):
            at = start + tl.cast(row, tl.int64) * channels + channel
            tl.store(grad_tokens + at, tl.load(grad + at, mask=in_row), mask=in_row)
    start += prefix.to(tl.int64) * channels

    own = start + query.to(tl.int64)[:, None] * channels + channel[None, :]
    mine = tl.load(grad + own, mask=mask, other=0.0).to(tl.float32)

    # Gradient by position, from the tokens at the four taps.
    packed = tl.load(cells + sample * queries + query, mask=in_map, other=0)
    fx = tl.load(fractions + 2 * (sample * queries + query), mask=in_map, other=0.0)[:, None]
    fy = tl.load(fractions + 2 * (sample * queries + query) + 1, mask=in_map, other=0.0)[:, None]
    right = mask & ((packed & RIGHT) != 0)[:, None]
    down = mask & ((packed & DOWN) != 0)[:, None]
    at = (start + (packed & (RIGHT - 1)).to(tl.int64) * channels)[:, None] + channel[None, :]
    below = width.to(tl.int64) * channels
    x00 = tl.load(tokens + at, mask=mask, other=0.0).to(tl.float32)
    x01 = tl.load(tokens + at + channels, mask=right, other=0.0).to(tl.float32)
    x10 = tl.load(tokens + at + below, mask=down, other=0.0).to(tl.float32)
    x11 = tl.load(tokens + at + below + channels, mask=right & down, other=0.0).to(tl.float32)
    by_x = tl.sum(mine * ((1 - fy) * (x01 - x00) + fy * (x11 - x10)), axis=1)
    by_y = tl.sum(mine * ((1 - fx) * (x10 - x00) + fx * (x11 - x01)), axis=1)
    target = grad_positions + 2 * ((sample * tiles + tile) * queries + query)
    tl.store(target, tl.where((packed & FREE_X) != 0, by_x, 0.0), mask=in_map)
    tl.store(target + 1, tl.where((packed & FREE_Y) != 0, by_y, 0.0), mask=in_map)

    # Gradient of the tokens, from the queries that read them: the cells left of and at the token,
    # then the same two in the row above.
    column = query % width
    collected = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    for up in tl.static_range(2):
        cell = query - up * width
        exists = in_map & (cell >= 0)
        limits = bounds + sample * (queries + 1) + cell
        entry = tl.load(limits - tl.where(column > 0, 1, 0), mask=exists, other=0)
        middle = tl.load(limits, mask=exists, other=0)
        end = tl.load(limits + 1, mask=exists, other=0)
        for _ in range(tl.max(end - entry, axis=0)):
            here = entry < end
            listed = sample * queries + entry
            reader = tl.load(readers + listed, mask=here, other=0).to(tl.int64)
            ex = tl.load(reader_fractions + 2 * listed, mask=here, other=0.0)
            ey = tl.load(reader_fractions + 2 * listed + 1, mask=here, other=0.0)
            weight = tl.where(entry < middle, ex, 1 - ex) * (ey if up == 1 else 1 - ey)
            source = (start + reader * channels)[:, None] + channel[None, :]
            theirs = tl.load(grad + source, mask=here[:, None] & in_row[None, :], other=0.0)
            collected += weight[:, None] * theirs.to(tl.float32)
            entry += 1
    result = mine + eta * collected
    tl.store(grad_tokens + own, result.to(grad_tokens.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def project_kernel(
    source_points,
    angle,
    basis,
    grad_positions,
    point_sums,
    grad_angle,
    eta,
    height,
    width,
    points,
    tiles,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One sample's gradient of the angle and of the source points: ``point_sums [B, 2 K]``.

    With ``P = M^T dG [K, 2]``: ``P R(angle)`` and ``sum_k <P_k, dR/dangle s_k>``.
    """
    sample = tl.program_id(0).to(tl.int64)
    queries = height * width
    theta = tl.load(angle + sample)
    cosine = tl.cos(theta)
    sine = tl.sin(theta)
    by_angle = tl.zeros((BLOCK_K,), tl.float32)
    for first_point in range(0, points, BLOCK_K):
        k = first_point + tl.arange(0, BLOCK_K)
        is_point = k < points
        px = tl.zeros((BLOCK_K,), tl.float32)
        py = tl.zeros((BLOCK_K,), tl.float32)
        for first in range(0, queries, BLOCK_Q):
            query = first + tl.arange(0, BLOCK_Q)
            in_map = query < queries
            gx = tl.zeros((BLOCK_Q,), tl.float32)
            gy = tl.zeros((BLOCK_Q,), tl.float32)
            for tile in range(tiles):
                at = grad_positions + 2 * ((sample * tiles + tile) * queries + query)
                gx += tl.load(at, mask=in_map, other=0.0)
                gy += tl.load(at + 1, mask=in_map, other=0.0)
            m = tl.load(
                basis + query.to(tl.int64)[:, None] * points + k[None, :],
                mask=in_map[:, None] & is_point[None, :],
                other=0.0,
            )
            px += tl.sum(m * gx[:, None], axis=0)
            py += tl.sum(m * gy[:, None], axis=0)
        px *= eta * ((width - 1) * 0.5)
        py *= eta * ((height - 1) * 0.5)
        sx = tl.load(source_points + 2 * k, mask=is_point, other=0.0)
        sy = tl.load(source_points + 2 * k + 1, mask=is_point, other=0.0)
        by_angle += py * (sx * cosine - sy * sine) - px * (sx * sine + sy * cosine)
        target = point_sums + 2 * (sample * points + k)
        tl.store(target, px * cosine + py * sine, mask=is_point)
        tl.store(target + 1, py * cosine - px * sine, mask=is_point)
    tl.store(grad_angle + sample, tl.sum(by_angle, axis=0))
