"""Forward Triton kernel of the masked part pooling; ``pool_kernels.py`` tells of the design."""

# The decorator replaces the functions, so annotations would describe something else.
# mypy: ignore-errors
# Triton's tuples can be added and not unpacked.
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from gsalign_kernels.triton.common_kernels import divide
from gsalign_kernels.triton.pool_weights_kernels import (
    MAX,
    NOWHERE,
    channel_weight,
    divisor_of,
    first_largest,
    side_by_side,
    softmax_scale,
    summarize,
    takes_over,
)

# Sizes of which a new value must not mean a new compilation. The number of channels of the tokens
# is not among them: knowing that 16 divides it gives 16-byte accesses.
SIZES = ["prefix", "positions", "mask_stride", "tiles", "groups", "slots"]


@triton.jit
def packed_pair(low, high):
    """Two float32 in the 64 bits that one load brings back."""
    low = low.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return low | (high.to(tl.int32, bitcast=True).to(tl.int64) << 32)


@triton.jit
def low_half(pair):
    """The first of two packed float32."""
    return pair.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def high_half(pair):
    """The second of two packed float32."""
    return (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def write_weights(
    masks,
    weights,
    first_part,
    positions,
    slots,
    CHANNELS: tl.constexpr,
    BACKGROUND: tl.constexpr,
    MODE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Weights of ``PARTS`` parts in all slots, in pairs of parts, and their sums.

    The slots before the first position add nothing: their weight is 0, and 1 among maxima, where
    their tokens are minus infinity.
    """
    pairs: tl.constexpr = (PARTS + 1) // 2
    padding: tl.constexpr = 1.0 if MODE == MAX else 0.0
    sums = ()
    for _ in tl.static_range(PARTS):
        sums = sums + (tl.zeros((SPAN,), tl.float32),)
    for start in range(0, slots, SPAN):
        slot = start + tl.arange(0, SPAN)
        position = slot - (slots - positions)
        inside = (position >= 0) & (slot < slots)
        largest, total = softmax_scale(
            masks, position, inside, positions, CHANNELS, ACTIVATION, GROUP
        )
        new_sums = ()
        found = ()
        for k in tl.static_range(2 * pairs):
            channel = BACKGROUND + first_part + k
            if k < PARTS:
                weight = channel_weight(
                    masks, channel, position, inside & (channel < CHANNELS), positions,
                    largest, total, ACTIVATION,
                )  # fmt: skip
            else:
                weight = tl.zeros((SPAN,), tl.float32)
            found = found + (tl.where(inside, weight, padding),)
            if k < PARTS:
                new_sums = new_sums + (sums[k] + weight,)
        for pair in tl.static_range(pairs):
            value = packed_pair(found[2 * pair], found[2 * pair + 1])
            tl.store(weights + slot * pairs + pair, value, mask=slot < slots)
        sums = new_sums
    return tl.sum(side_by_side(sums, PARTS), axis=0)


@triton.jit
def row_weights(weights, index: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr):
    """Weights ``[ROWS, 1]`` of all parts, two with each load, in the ``index``-th tile of rows.

    There are fewer of them than threads, so that the compiler loads each where it is needed.
    """
    pairs: tl.constexpr = (PARTS + 1) // 2
    found = ()
    for pair in tl.static_range(pairs):
        both = tl.load(weights + (index * ROWS * pairs + pair))
        found = found + (low_half(both)[:, None], high_half(both)[:, None])
    return found


@triton.jit
def add_sums(sums, tokens, weight, PARTS: tl.constexpr):
    """Adds weighted tokens to a tile ``[ROWS, BLOCK_C]`` per part."""
    added = ()
    for k in tl.static_range(PARTS):
        added = added + (sums[k] + weight[k] * tokens,)
    return added


@triton.jit
def add_maxima(maxima, slots, tokens, weight, slot, PARTS: tl.constexpr):
    """Takes weighted tokens into the largest ones so far, and the slots they come from."""
    new_maxima = ()
    new_slots = ()
    for k in tl.static_range(PARTS):
        product = weight[k] * tokens
        better = takes_over(product, maxima[k])
        new_maxima = new_maxima + (tl.where(better, product, maxima[k]),)
        new_slots = new_slots + (tl.where(better, slot, slots[k]),)
    return new_maxima, new_slots


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    tokens,
    masks,
    weights,
    pooled,
    visibility,
    totals,
    peaks,
    winners,
    eps,
    prefix,
    positions,
    channels,
    mask_stride,
    slots,
    tiles,
    groups,
    CHANNELS: tl.constexpr,
    BACKGROUND: tl.constexpr,
    MODE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BINARY: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    ROUNDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPAN: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """A group of ``PARTS`` parts: their sums, visibilities and peaks, or a tile of channels.

    Positions lie in slots, of which a whole number of blocks is gone through: the last one is the
    last position, so that only the first block has slots without a position.
    """
    program = tl.program_id(0)
    unit = program % (tiles + 1) - 1
    first_part = program // (tiles + 1) % groups * PARTS
    sample = (program // (tiles + 1) // groups).to(tl.int64)
    parts: tl.constexpr = CHANNELS - BACKGROUND
    masks += sample * mask_stride
    if unit < 0:
        out = sample * parts
        summarize(
            masks, visibility + out, totals + out, peaks + out, first_part, positions,
            CHANNELS, BACKGROUND, ACTIVATION, BINARY, PARTS, GROUP, SPAN,
        )  # fmt: skip
    else:
        block: tl.constexpr = ROUNDS * ROWS
        pairs: tl.constexpr = (PARTS + 1) // 2
        column = unit * BLOCK_C + tl.arange(0, BLOCK_C)
        row = tl.arange(0, ROWS)
        in_row = (column < channels)[None, :]
        padded = slots - positions
        # Tokens lie within 32 bits of the first of their block.
        offset = row[:, None] * channels + column[None, :]
        source = tokens + (sample * (prefix + positions) + prefix - padded) * channels + offset
        step = tl.cast(channels, tl.int64) * ROWS
        # The first block is under way while the weights are made.
        nothing: tl.constexpr = -float("inf") if MODE == MAX else 0.0
        rows = ()
        for index in tl.static_range(ROUNDS):
            exists = (index * ROWS + row >= padded)[:, None] & in_row
            rows = rows + (tl.load(source + index * step, mask=exists, other=nothing),)
        own = weights + program.to(tl.int64) * slots * pairs
        divided_by = write_weights(
            masks, own, first_part, positions, slots,
            CHANNELS, BACKGROUND, MODE, ACTIVATION, PARTS, GROUP, SPAN,
        )  # fmt: skip
        tl.debug_barrier()  # now every thread sees all of them

        best = ()
        won = ()
        for _ in tl.static_range(PARTS):
            if MODE == MAX:
                best = best + (tl.full((ROWS, BLOCK_C), -float("inf"), tl.float32),)
                won = won + (tl.full((ROWS, BLOCK_C), NOWHERE, tl.int32),)
            else:
                best = best + (tl.zeros((ROWS, BLOCK_C), tl.float32),)
        for start in range(0, slots - block, block):
            source += ROUNDS * step
            # A minimum that changes nothing: through it the compiler sees no pointer per load that
            # it could keep and advance, at two registers and two instructions each.
            first = tl.minimum(start, slots) + row
            ahead = ()
            for index in tl.static_range(ROUNDS):
                # A tile's registers take its successor as soon as it is used up.
                x = rows[index].to(tl.float32)
                weight = row_weights(own + first * pairs, index, PARTS, ROWS)
                if MODE == MAX:
                    best, won = add_maxima(
                        best, won, x, weight, (first + index * ROWS)[:, None], PARTS
                    )
                else:
                    best = add_sums(best, x, weight, PARTS)
                if WHOLE:
                    ahead = ahead + (tl.load(source + index * step),)
                else:
                    ahead = ahead + (tl.load(source + index * step, mask=in_row),)
            rows = ahead
        first = slots - block + row
        for index in tl.static_range(ROUNDS):
            x = rows[index].to(tl.float32)
            weight = row_weights(own + first * pairs, index, PARTS, ROWS)
            if MODE == MAX:
                best, won = add_maxima(best, won, x, weight, (first + index * ROWS)[:, None], PARTS)
            else:
                best = add_sums(best, x, weight, PARTS)

        part = first_part + tl.arange(0, triton.next_power_of_2(PARTS))[None, :]
        exists = (part < first_part + PARTS) & (part < parts) & (column < channels)[:, None]
        target = (sample * parts + part) * channels + column[:, None]
        if MODE == MAX:
            result, where = first_largest(side_by_side(best, PARTS), side_by_side(won, PARTS), 0)
            # Nothing is above minus infinity, so the first position is as large as any.
            where = tl.where(where == NOWHERE, 0, where - padded)
            tl.store(winners + target, where, mask=exists)
        else:
            result = tl.sum(side_by_side(best, PARTS), axis=0)
            divisor = divisor_of(divided_by, positions, eps, MODE)
            result = divide(result, divisor, tl.float32)
        tl.store(pooled + target, result.to(pooled.dtype.element_ty), mask=exists)
