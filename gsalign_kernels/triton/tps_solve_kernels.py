"""Triton kernels that solve for the coefficients of thin-plate splines; imports triton.

The method is that of ``csrc/tps/tps_system.h``: three Householder reflections take
``P = [1, x, y]`` to its triangular factor R, ``Phi' = Q^T (Phi + reg I) Q`` has a positive definite
block behind its first three rows, and that block a Cholesky factor L without pivoting. All in
float64.

One program factors a sample, column by column, from the columns before it; these stay in the
caches. A whole matrix in registers would be as quick for a few dozen points, but spills at a
hundred.

Factors per sample, ``K (K + 1) / 2 + 3 K + 3`` numbers: the lower triangle by columns, which holds
the first three columns of Phi' and then L with the inverses of its diagonal; three reflections
``v_s`` with ``H_s = I - v_s v_s^T``, where ``R[i, s]`` stands in place of the zeros above; the
diagonal of R, which starts with NaN for a sample that cannot be solved.
"""

# The decorator replaces the functions, so annotations would describe something else.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from gsalign_kernels.triton.common_kernels import radial_basis

__all__ = [
    "adjoint_kernel",
    "assemble_kernel",
    "cholesky_kernel",
    "substitute_kernel",
    "transform_kernel",
]

# Sizes of which a new value must not mean a new compilation.
SIZES = ["points", "rows", "columns", "blocks", "tiles"]

EPSILON = tl.constexpr(2.220446049250313e-16)

SINGULAR = tl.constexpr(1)
NOT_FINITE = tl.constexpr(2)


@triton.jit
def triangle_size(points):
    """Numbers in the lower triangle; the reflections come behind them."""
    return points * (points + 1) // 2


@triton.jit
def column_start(k, points):
    """Where column ``k`` of the lower triangle starts, with its element on the diagonal."""
    return k * points - k * (k - 1) // 2


@triton.jit(do_not_specialize=SIZES)
def assemble_kernel(
    control_points,
    factors,
    points,
    tiles,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """A tile of Phi into the triangle, where the factors will come to stand."""
    program = tl.program_id(0)
    sample = (program // tiles // tiles).to(tl.int64)
    i = program // tiles % tiles * BLOCK_I + tl.arange(0, BLOCK_I)
    j = program % tiles * BLOCK_J + tl.arange(0, BLOCK_J)
    of_row = control_points + 2 * (sample * points + i)
    of_column = control_points + 2 * (sample * points + j)
    x = tl.load(of_row, mask=i < points, other=0.0).to(tl.float64)[:, None]
    y = tl.load(of_row + 1, mask=i < points, other=0.0).to(tl.float64)[:, None]
    dx = x - tl.load(of_column, mask=j < points, other=0.0).to(tl.float64)[None, :]
    dy = y - tl.load(of_column + 1, mask=j < points, other=0.0).to(tl.float64)[None, :]
    value, _ = radial_basis(dx * dx + dy * dy)
    target = factors + sample * (triangle_size(points) + 3 * points + 3)
    target += column_start(j, points)[None, :] + i[:, None] - j[None, :]
    tl.store(target, value, mask=(i < points)[:, None] & (j[None, :] <= i[:, None]))


@triton.jit
def elements(vector, lane, j):
    """Elements ``j`` of a vector that lies across the lanes."""
    return tl.sum(tl.where(lane[None, :] == j[:, None], vector[None, :], 0.0), axis=1)


@triton.jit
def along(a, b):
    """``a . b``."""
    return tl.sum(a * b, axis=0)


@triton.jit
def reflection(p, s, lane):
    """``v`` with ``(I - v v^T) p`` zero behind element ``s``, and that element."""
    v = tl.where(lane >= s, p, 0.0)
    head = tl.sum(tl.where(lane == s, p, 0.0), axis=0)
    norm = tl.sqrt(along(v, v))
    height = tl.where(head < 0.0, norm, -norm)
    v = tl.where(lane == s, head - height, v)
    square = along(v, v)
    return v * tl.sqrt(2.0 / tl.where(square > 0.0, square, 1.0)), height


@triton.jit(do_not_specialize=SIZES)
def transform_kernel(
    control_points,
    factors,
    info,
    vanishing_pivots,
    regularization: tl.float64,
    points,
    N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """One sample's R and reflections, Phi' in place of Phi; what makes it impossible to solve.

    Tiles are columns x rows, with a row to a lane, so that sums over columns need no exchange.
    """
    sample = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, N)
    inside = lane < points
    point = control_points + 2 * (sample * points + lane)
    x = tl.load(point, mask=inside, other=0.0).to(tl.float64)
    y = tl.load(point + 1, mask=inside, other=0.0).to(tl.float64)
    finite = tl.sum((x - x) + (y - y), axis=0) == 0.0
    farthest = tl.maximum(tl.max(tl.maximum(tl.abs(x), tl.abs(y)), axis=0), 1.0)
    factors += sample * (triangle_size(points) + 3 * points + 3)
    reflections = factors + triangle_size(points)

    # P to R and the reflections v; columns later than the one reflected are transformed.
    tolerance = points.to(tl.float64) * EPSILON
    vanishing_height = 2.0 * tolerance * tl.sqrt(points.to(tl.float64)) * farthest
    heights = reflections + 3 * points
    v0, height = reflection(tl.where(inside, 1.0, 0.0).to(tl.float64), 0, lane)
    regular = finite & (tl.abs(height) > vanishing_height)
    tl.store(heights, height)
    tl.store(reflections + lane, v0, mask=inside)
    p1 = x - v0 * along(v0, x)
    p2 = y - v0 * along(v0, y)
    v1, height = reflection(p1, 1, lane)
    regular = regular & (tl.abs(height) > vanishing_height)
    tl.store(heights + 1, height)
    tl.store(reflections + points + lane, tl.where(lane < 1, p1, v1), mask=inside)
    p2 -= v1 * along(v1, p2)
    # Points on a line leave R_22 a few roundings, which R_12 / R_11 magnifies.
    r12 = tl.sum(tl.where(lane == 1, p2, 0.0), axis=0)
    vanishing_height *= 1.0 + tl.abs(r12 / height)
    v2, height = reflection(p2, 2, lane)
    regular = regular & (tl.abs(height) > vanishing_height)
    tl.store(heights + 2, height)
    tl.store(reflections + 2 * points + lane, tl.where(lane < 2, p2, v2), mask=inside)

    # Phi times each v.
    y0 = tl.zeros((N,), tl.float64)
    y1 = tl.zeros((N,), tl.float64)
    y2 = tl.zeros((N,), tl.float64)
    peaks = tl.zeros((N,), tl.float64)
    for first in range(0, points, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        low = tl.minimum(lane[None, :], j[:, None])
        at = factors + column_start(low, points) + tl.maximum(lane[None, :], j[:, None]) - low
        phi = tl.load(at, mask=inside[None, :] & (j < points)[:, None], other=0.0)
        peaks = tl.maximum(peaks, tl.max(tl.abs(phi), axis=0))
        phi = tl.where(lane[None, :] == j[:, None], regularization, phi)
        y0 += tl.sum(phi * elements(v0, lane, j)[:, None], axis=0)
        y1 += tl.sum(phi * elements(v1, lane, j)[:, None], axis=0)
        y2 += tl.sum(phi * elements(v2, lane, j)[:, None], axis=0)
    vanishing_pivot = tolerance * (tl.max(peaks, axis=0) + regularization)
    regular = regular & (vanishing_pivot < float("inf"))
    tl.store(vanishing_pivots + sample, vanishing_pivot)
    tl.store(info + sample, tl.where(finite, tl.where(regular, 0, SINGULAR), NOT_FINITE))
    if regular == 0:
        tl.store(heights, float("nan"))

    # H Phi H = Phi - v w^T - w v^T, and then the next one on that.
    w0 = y0 - 0.5 * along(v0, y0) * v0
    y1 -= v0 * along(w0, v1) + w0 * along(v0, v1)
    w1 = y1 - 0.5 * along(v1, y1) * v1
    y2 -= v0 * along(w0, v2) + w0 * along(v0, v2) + v1 * along(w1, v2) + w1 * along(v1, v2)
    w2 = y2 - 0.5 * along(v2, y2) * v2
    # Every thread has read what others now overwrite.
    tl.debug_barrier()
    for first in range(0, points, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        at = factors + column_start(j, points)[:, None] + lane[None, :] - j[:, None]
        mask = inside[None, :] & (lane[None, :] >= j[:, None])
        phi = tl.load(at, mask=mask, other=0.0)
        phi = tl.where(lane[None, :] == j[:, None], regularization, phi)
        phi -= v0[None, :] * elements(w0, lane, j)[:, None]
        phi -= w0[None, :] * elements(v0, lane, j)[:, None]
        phi -= v1[None, :] * elements(w1, lane, j)[:, None]
        phi -= w1[None, :] * elements(v1, lane, j)[:, None]
        phi -= v2[None, :] * elements(w2, lane, j)[:, None]
        phi -= w2[None, :] * elements(v2, lane, j)[:, None]
        tl.store(at, phi, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def cholesky_kernel(
    factors,
    info,
    vanishing_pivots,
    points,
    N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """One sample's L in place of Phi' behind the first three columns; a barrier after each."""
    sample = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, N)
    inside = lane < points
    factors += sample * (triangle_size(points) + 3 * points + 3)
    vanishing_pivot = tl.load(vanishing_pivots + sample)
    outcome = tl.load(info + sample)
    regular = outcome == 0
    for k in range(3, points):
        own = factors + column_start(k, points) + lane - k
        below = inside & (lane >= k)
        taken = tl.zeros((BLOCK_J, N), tl.float64)
        for first in range(3, k, BLOCK_J):
            j = first + tl.arange(0, BLOCK_J)
            start = factors + column_start(j, points) - j
            before = j < k
            row = tl.load(start + k, mask=before, other=0.0)[:, None]
            mask = below[None, :] & before[:, None]
            taken += row * tl.load(start[:, None] + lane[None, :], mask=mask, other=0.0)
        column = tl.load(own, mask=below, other=0.0) - tl.sum(taken, axis=0)
        pivot = tl.sum(tl.where(lane == k, column, 0.0), axis=0)
        regular = regular & (pivot > vanishing_pivot)
        inverse = 1.0 / tl.sqrt(tl.where(pivot > 0.0, pivot, 1.0))
        tl.store(own, tl.where(lane == k, inverse, column * inverse), mask=below)
        tl.debug_barrier()
    if (outcome == 0) & (regular == 0):
        tl.store(info + sample, SINGULAR)
        tl.store(factors + triangle_size(points) + 3 * points, float("nan"))


@triton.jit
def reflect(q, reflections, s, lane, points):
    """``H_s q``."""
    v = tl.load(reflections + s * points + lane, mask=(lane < points) & (lane >= s), other=0.0)
    v = v[:, None]
    return q - v * tl.sum(v * q, axis=0)[None, :]


@triton.jit(do_not_specialize=SIZES)
def substitute_kernel(
    right_hand_side,
    factors,
    output,
    leading,
    points,
    rows,
    columns,
    blocks,
    ADJOINT: tl.constexpr,
    N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A block of columns of the solution for ``right_hand_side [B, rows, columns]``.

    In the forward pass there are K rows and the last three of the system are zero; when ``ADJOINT``
    there are K + 3, and the first K of the solution also go to ``leading``.
    """
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    stride = columns.to(tl.int64)
    lane = tl.arange(0, N)
    row = lane[:, None]
    v = program % blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    in_block = v < columns
    mask = (row < points) & in_block[None, :]
    right_hand_side += sample * rows * stride
    q = tl.load(right_hand_side + row * stride + v[None, :], mask=mask, other=0.0).to(tl.float64)
    factors += sample * (triangle_size(points) + 3 * points + 3)
    reflections = factors + triangle_size(points)
    r00 = tl.load(reflections + 3 * points)
    r11 = tl.load(reflections + 3 * points + 1)
    r22 = tl.load(reflections + 3 * points + 2)
    r01 = tl.load(reflections + points)
    r02 = tl.load(reflections + 2 * points)
    r12 = tl.load(reflections + 2 * points + 1)

    for s in tl.static_range(3):
        q = reflect(q, reflections, s, lane, points)
    # R^T w = g2, and what it takes from the rest.
    w0 = tl.zeros((BLOCK_V,), tl.float64)
    w1 = w0
    w2 = w0
    if ADJOINT:
        last = right_hand_side + points * stride + v
        w0 = tl.load(last, mask=in_block, other=0.0).to(tl.float64) / r00
        w1 = tl.load(last + stride, mask=in_block, other=0.0).to(tl.float64)
        w1 = (w1 - r01 * w0) / r11
        w2 = tl.load(last + 2 * stride, mask=in_block, other=0.0).to(tl.float64)
        w2 = (w2 - r02 * w0 - r12 * w1) / r22
        for s in tl.static_range(3):
            phi = phi_column(factors, s, lane, points)
            q -= phi[:, None] * (w0 if s == 0 else w1 if s == 1 else w2)[None, :]
    # L L^T z = q behind the first three rows.
    for k in range(3, points):
        column = factors + column_start(k, points)
        below = tl.load(column + lane - k, mask=(lane > k) & (lane < points), other=0.0)
        z = tl.sum(tl.where(row == k, q, 0.0), axis=0) * tl.load(column)
        q = tl.where(row == k, z[None, :], q - below[:, None] * z[None, :])
    for step in range(3, points):
        k = points + 2 - step
        column = factors + column_start(k, points)
        below = tl.load(column + lane - k, mask=(lane > k) & (lane < points), other=0.0)
        z = tl.sum(tl.where(row == k, q, -below[:, None] * q), axis=0) * tl.load(column)
        q = tl.where(row == k, z[None, :], q)
    # R a = what is left of the first three rows.
    a0 = remaining(q, factors, 0, lane, points)
    a1 = remaining(q, factors, 1, lane, points)
    a2 = remaining(q, factors, 2, lane, points) / r22
    a1 = (a1 - r12 * a2) / r11
    a0 = (a0 - r01 * a1 - r02 * a2) / r00
    q = tl.where(row == 0, w0[None, :], tl.where(row == 1, w1[None, :], q))
    q = tl.where(row == 2, w2[None, :], q)
    for s in tl.static_range(3):
        q = reflect(q, reflections, 2 - s, lane, points)

    spoiled = r00 != r00
    q = tl.where(spoiled, float("nan"), q)
    dtype: tl.constexpr = output.dtype.element_ty
    target = output + sample * (points + 3) * stride + v
    tl.store(target[None, :] + row * stride, q.to(dtype), mask=mask)
    target += points * stride
    tl.store(target, a0.to(dtype), mask=in_block)
    tl.store(target + stride, tl.where(spoiled, float("nan"), a1).to(dtype), mask=in_block)
    tl.store(target + 2 * stride, tl.where(spoiled, float("nan"), a2).to(dtype), mask=in_block)
    if ADJOINT:
        target = leading + sample * points * stride + v
        tl.store(target[None, :] + row * stride, q.to(leading.dtype.element_ty), mask=mask)


@triton.jit
def phi_column(factors, s, lane, points):
    """Column ``s`` of Phi', of the first three; below the diagonal as stored, above by symmetry."""
    low = tl.minimum(lane, s)
    at = factors + column_start(low, points) + tl.maximum(lane, s) - low
    return tl.load(at, mask=lane < points, other=0.0)


@triton.jit
def remaining(q, factors, s, lane, points):
    """Row ``s`` of ``q``, of the first three, less what row ``s`` of Phi' takes of the others."""
    phi = phi_column(factors, s, lane, points)
    taken = tl.where(lane >= 3, -phi, 0.0)[:, None] * q
    return tl.sum(tl.where(lane[:, None] == s, q, taken), axis=0)


@triton.jit(do_not_specialize=SIZES)
def adjoint_kernel(
    solution,
    coefficients,
    control_points,
    grad_points,
    points,
    columns,
    blocks,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Gradient of a block of control points, from the solution z of the adjoint system.

    The matrix has gradient ``G = -z w^T``; as it is symmetric, an entry that moves with point i
    weighs ``G_ij + G_ji``. Its row holds U of the distances, then 1, x, y.
    """
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    stride = columns.to(tl.int64)
    i = program % blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    is_point = i < points
    control_points += 2 * sample * points
    solution += sample * (points + 3) * stride
    coefficients += sample * (points + 3) * stride
    x = tl.load(control_points + 2 * i, mask=is_point, other=0.0).to(tl.float64)[:, None]
    y = tl.load(control_points + 2 * i + 1, mask=is_point, other=0.0).to(tl.float64)[:, None]
    gx = tl.zeros((BLOCK_I,), tl.float64)
    gy = tl.zeros((BLOCK_I,), tl.float64)
    for first in range(0, points + 3, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        in_row = j < points + 3
        weight = tl.zeros((BLOCK_I, BLOCK_J), tl.float64)
        for v in range(columns):
            zi = tl.load(solution + i * stride + v, mask=is_point, other=0.0)
            zj = tl.load(solution + j * stride + v, mask=in_row, other=0.0)
            wi = tl.load(coefficients + i * stride + v, mask=is_point, other=0.0).to(tl.float64)
            wj = tl.load(coefficients + j * stride + v, mask=in_row, other=0.0).to(tl.float64)
            weight -= zi[:, None] * wj[None, :] + zj[None, :] * wi[:, None]
        other = control_points + 2 * j
        dx = x - tl.load(other, mask=j < points, other=0.0).to(tl.float64)[None, :]
        dy = y - tl.load(other + 1, mask=j < points, other=0.0).to(tl.float64)[None, :]
        _, slope = radial_basis(dx * dx + dy * dy)
        j = j[None, :]
        by_x = tl.where(j < points, 2.0 * slope * dx, tl.where(j == points + 1, 1.0, 0.0))
        by_y = tl.where(j < points, 2.0 * slope * dy, tl.where(j == points + 2, 1.0, 0.0))
        gx += tl.sum(weight * by_x, axis=1)
        gy += tl.sum(weight * by_y, axis=1)
    dtype: tl.constexpr = grad_points.dtype.element_ty
    target = grad_points + 2 * (sample * points + i)
    tl.store(target, gx.to(dtype), mask=is_point)
    tl.store(target + 1, gy.to(dtype), mask=is_point)
