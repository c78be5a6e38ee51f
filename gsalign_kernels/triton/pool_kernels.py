"""Triton kernels of the masked part pooling; the only file of it that imports triton.

What has to move, for B 64, N 128, C 768, P 6 (masks and pooled parts are 6 % more), its time at the
4.15 TB/s that an H200 copies, and the products of a weight and a token:

              forward             backward            products
    float32   25.2 MB   6.1 us    50.3 MB   12.1 us   38 M forward, 75 M backward
    bfloat16  12.6 MB   3.0 us    25.2 MB    6.1 us   the same

The products are made value by value in float32: 1.1 and 2.3 us of that GPU's 67 TFLOP/s. Matrix
units have little to win: in float32 there are none, and in bfloat16 the weights would come in two
halves, of which one that is 0 makes a NaN of an infinite token. What counts is instructions, so the
tiles are laid out with the axes that are summed first inside a thread:

- forward ``[part, round, row, channel]``: a thread has 16 bytes of a row, and of the rows that are
  ``ROWS`` apart. It adds up rounds in registers, and its neighbours' rows once, at the end.
- backward ``[part, round, row, lane, value]``: a thread has the 16 bytes ``value`` of a row. It
  adds up their products in registers, and lanes once, at the end.

Per 16 bytes of tokens that makes 43 instructions forward and 81 backward in float32 (24 and 48 of
them products), 78 and 182 in bfloat16 (48 and 96), a softmax not counted: with four instructions a
clock on 132 multiprocessors at 1.7 GHz 2.4 and 4.4, 2.1 and 5.0 us, less than memory takes.

Backward the gradients of the pooled parts are read twice, for the dot products and for the tokens'
gradients, so that neither loop needs the other's registers; tokens are read once.

A channel of the masks is a part, or the background before the parts. More channels than
``BLOCK_P`` are worked on in turn, with the tokens read again through the caches.
"""

# The decorator replaces the functions, so annotations would describe something else.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from gsalign_kernels.triton.common_kernels import divide

__all__ = ["backward_kernel", "finish_kernel", "forward_kernel"]

# Sizes of which a new value must not mean a new compilation. The number of channels of the tokens
# is not among them: knowing that 16 divides it gives 16-byte accesses.
SIZES = ["prefix", "positions", "mask_stride", "tiles", "blocks", "samples"]

# Modes and activations, as the operators number them.
WEIGHTED_MEAN = tl.constexpr(0)
MAX = tl.constexpr(2)
SOFTMAX = tl.constexpr(1)
SIGMOID = tl.constexpr(2)

NOWHERE = tl.constexpr(2**31 - 1)
"""A position behind every other."""


@triton.jit
def pick(tile, index: tl.constexpr, AXIS: tl.constexpr):
    """A float32 tile at one index of an axis; free where threads hold the whole axis.

    For there the compiler makes the comparison, and drops the sum with zeros, which it may do among
    integers only; hence the bits.
    """
    at = tl.arange(0, tile.shape[AXIS])
    for axis in tl.static_range(len(tile.shape)):
        if axis != AXIS:
            at = tl.expand_dims(at, axis)
    bits = tl.where(at == index, tile.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, axis=AXIS).to(tl.float32, bitcast=True)


@triton.jit
def accumulate(result, products, AXIS: tl.constexpr, FIRST: tl.constexpr, END: tl.constexpr):
    """``result`` plus ``products`` at ``FIRST`` to ``END`` of an axis, added in order.

    For an axis that threads hold as a whole, which makes it multiply-adds and nothing else:
    ``tl.sum`` adds pairs first, and takes half as many instructions again.
    """
    for index in tl.static_range(FIRST, END):
        result += pick(products, index, AXIS)
    return result


@triton.jit
def load_masks(
    masks, first, position, inside, positions, CHANNELS: tl.constexpr, BLOCK_P: tl.constexpr
):
    """Channels ``first``, ... of one sample's masks at ``position [i, j]``, and where they exist.

    What does not exist is minus infinity, so that a softmax gives it nothing.
    """
    channel = first + tl.arange(0, BLOCK_P)[:, None, None]
    exists = (channel < CHANNELS) & inside[None, :, :]
    values = tl.load(
        masks + (channel * positions + position[None, :, :]), mask=exists, other=-float("inf")
    )
    return values, exists


@triton.jit
def softmax_scale(
    masks,
    position,
    inside,
    positions,
    CHANNELS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """What the softmax at each position subtracts and divides by; unused by other activations."""
    largest = tl.full(position.shape, -float("inf"), tl.float32)
    total = tl.zeros(position.shape, tl.float32)
    if ACTIVATION == SOFTMAX:
        for first in range(0, CHANNELS, BLOCK_P):
            logits, _ = load_masks(masks, first, position, inside, positions, CHANNELS, BLOCK_P)
            largest = tl.maximum(largest, tl.max(logits, axis=0))
        for first in range(0, CHANNELS, BLOCK_P):
            logits, _ = load_masks(masks, first, position, inside, positions, CHANNELS, BLOCK_P)
            total += tl.sum(tl.exp(logits - largest[None, :, :]), axis=0)
    return largest, total


@triton.jit
def part_weights(
    masks,
    first,
    position,
    inside,
    positions,
    largest,
    total,
    CHANNELS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Weights ``[BLOCK_P, i, j]`` of channels ``first``, ...; 0 where there is none."""
    values, exists = load_masks(masks, first, position, inside, positions, CHANNELS, BLOCK_P)
    if ACTIVATION == SOFTMAX:
        values = tl.exp(values - largest[None, :, :]) / total[None, :, :]
    elif ACTIVATION == SIGMOID:
        values = 1.0 / (1.0 + tl.exp(-values))
    return tl.where(exists, values, 0.0)


@triton.jit
def divisors(totals, positions, eps, MODE: tl.constexpr):
    """What sums of ``m x`` are divided by, as ``divisor()`` in ``csrc/pool/pool.h``."""
    if MODE == WEIGHTED_MEAN:
        return tl.where(totals < eps, eps, totals)
    elif MODE == MAX:
        return tl.full(totals.shape, 1.0, tl.float32)
    else:
        return tl.full(totals.shape, 1.0, tl.float32) * positions


@triton.jit
def takes_over(value, largest):
    """Whether a value replaces the largest so far, as ``takes_over()`` in ``csrc/pool/pool.h``."""
    return (value > largest) | (value != value)


@triton.jit
def first_largest(value, position, AXIS: tl.constexpr):
    """Largest value along an axis, NaN above all numbers, and its first position."""
    unordered = value != value
    broken = tl.max(unordered.to(tl.int32), axis=AXIS, keep_dims=True) > 0
    largest = tl.max(value, axis=AXIS, keep_dims=True)
    here = tl.where(broken, unordered, value == largest)
    first = tl.min(tl.where(here, position, NOWHERE), axis=AXIS, keep_dims=True)
    return tl.where(broken, float("nan"), largest), first


@triton.jit
def leading_channel(
    masks,
    position,
    inside,
    positions,
    largest,
    total,
    CHANNELS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The first channel with the largest weight at each position, -1 where none is positive.

    And where one is NaN: that one leads, and is not positive.
    """
    leader = tl.full(position.shape, -1, tl.int32)
    lead = tl.zeros(position.shape, tl.float32)
    for first in range(0, CHANNELS, BLOCK_P):
        channel = first + tl.arange(0, BLOCK_P)[:, None, None]
        weights = part_weights(
            masks, first, position, inside, positions, largest, total,
            CHANNELS, ACTIVATION, BLOCK_P,
        )  # fmt: skip
        channel = tl.broadcast_to(channel, weights.shape)
        most, which = first_largest(weights, channel, 0)
        better = takes_over(most, lead[None, :, :])
        lead = tl.sum(tl.where(better, most, lead[None, :, :]), axis=0)
        leader = tl.sum(tl.where(better, which, leader[None, :, :]), axis=0)
    return tl.where(lead > 0.0, leader, -1)


@triton.jit
def summarize(
    masks,
    visibility,
    totals,
    peaks,
    positions,
    CHANNELS: tl.constexpr,
    BACKGROUND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BINARY: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Sum of the weights, visibility and peak of every part of a sample."""
    for first in range(0, CHANNELS, BLOCK_P):
        channel = first + tl.arange(0, BLOCK_P)[:, None, None]
        place = tl.arange(0, SPAN)[None, :]
        sums = tl.zeros((BLOCK_P, 1, SPAN), tl.float32)
        seen = tl.full((BLOCK_P, 1, SPAN), 0.0 if BINARY else -float("inf"), tl.float32)
        peak = tl.broadcast_to(
            tl.where(place < positions, place, NOWHERE)[None, :, :], (BLOCK_P, 1, SPAN)
        )
        for start in range(0, positions, SPAN):
            position = start + place
            inside = position < positions
            largest, total = softmax_scale(
                masks, position, inside, positions, CHANNELS, ACTIVATION, BLOCK_P
            )
            weights = part_weights(
                masks, first, position, inside, positions, largest, total,
                CHANNELS, ACTIVATION, BLOCK_P,
            )  # fmt: skip
            sums += weights
            if BINARY:
                leader = leading_channel(
                    masks, position, inside, positions, largest, total,
                    CHANNELS, ACTIVATION, BLOCK_P,
                )  # fmt: skip
                seen = tl.where(channel == leader[None, :, :], 1.0, seen)
            else:
                better = inside[None, :, :] & takes_over(weights, seen)
                seen = tl.where(better, weights, seen)
                peak = tl.where(better, position[None, :, :], peak)
        if BINARY:
            seen = tl.max(seen, axis=2, keep_dims=True)
            peak = tl.full((BLOCK_P, 1, 1), -1, tl.int32)
        else:
            seen, peak = first_largest(seen, peak, 2)
        part = channel - BACKGROUND
        exists = (part >= 0) & (channel < CHANNELS)
        tl.store(totals + part, tl.sum(sums, axis=2, keep_dims=True), mask=exists)
        tl.store(visibility + part, seen, mask=exists)
        tl.store(peaks + part, peak, mask=exists)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    tokens,
    masks,
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
    tiles,
    CHANNELS: tl.constexpr,
    BACKGROUND: tl.constexpr,
    MODE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BINARY: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ROUNDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPAN: tl.constexpr,
):
    """A sample's sums, visibilities and peaks, or a tile of channels of its pooled parts."""
    program = tl.program_id(0)
    sample = (program // (tiles + 1)).to(tl.int64)
    tile = program % (tiles + 1) - 1
    parts: tl.constexpr = CHANNELS - BACKGROUND
    masks += sample * mask_stride
    if tile < 0:
        out = sample * parts
        summarize(
            masks, visibility + out, totals + out, peaks + out, positions,
            CHANNELS, BACKGROUND, ACTIVATION, BINARY, BLOCK_P, SPAN,
        )  # fmt: skip
    else:
        column = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        in_row = (column < channels)[None, None, None, :]
        round_row = tl.arange(0, ROUNDS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        # Tokens lie within 32 bits of the first of their tile.
        offset = round_row[None, :, :, None] * channels + column[None, None, None, :]
        rows = tokens + (sample * (prefix + positions) + prefix) * channels
        for first in range(0, CHANNELS, BLOCK_P):
            sums = tl.zeros((BLOCK_P, ROUNDS, ROWS), tl.float32)
            if MODE == MAX:
                result = tl.full((BLOCK_P, ROWS, BLOCK_C), -float("inf"), tl.float32)
                begin = tl.arange(0, ROWS)[None, :, None]
                begin = tl.where(begin < positions, begin, NOWHERE)
                winner = tl.broadcast_to(begin, (BLOCK_P, ROWS, BLOCK_C))
            else:
                result = tl.zeros((BLOCK_P, ROWS, BLOCK_C), tl.float32)
            for start in range(0, positions, ROUNDS * ROWS):
                position = start + round_row
                inside = position < positions
                values = tl.load(
                    rows + tl.cast(start, tl.int64) * channels + offset,
                    mask=inside[None, :, :, None] & in_row,
                    other=0.0,
                ).to(tl.float32)
                largest, total = softmax_scale(
                    masks, position, inside, positions, CHANNELS, ACTIVATION, BLOCK_P
                )
                weights = part_weights(
                    masks, first, position, inside, positions, largest, total,
                    CHANNELS, ACTIVATION, BLOCK_P,
                )  # fmt: skip
                products = weights[:, :, :, None] * values
                if MODE == MAX:
                    for index in tl.static_range(ROUNDS):
                        row = start + (index * ROWS + tl.arange(0, ROWS))[None, :, None]
                        product = pick(products, index, 1)
                        better = (row < positions) & takes_over(product, result)
                        result = tl.where(better, product, result)
                        winner = tl.where(better, row, winner)
                else:
                    result = accumulate(result, products, 1, 0, ROUNDS)
                    sums += weights
            channel = first + tl.arange(0, BLOCK_P)[:, None, None]
            part = channel - BACKGROUND
            target = (sample * parts + part) * channels + column[None, None, :]
            is_part = (part >= 0) & (channel < CHANNELS)
            exists = is_part & (column < channels)[None, None, :]
            # Channels that are no parts stand in registers of their own, and with nobody to read
            # them the compiler leaves out their products.
            result = tl.where(is_part, result, 0.0)
            if MODE == MAX:
                winner = tl.where(is_part, winner, 0)
                result, winner = first_largest(result, winner, 1)
                tl.store(winners + target, winner, mask=exists)
            else:
                summed = tl.sum(tl.sum(sums, axis=2, keep_dims=True), axis=1, keep_dims=True)
                divisor = divisors(summed, positions, eps, MODE)
                result = divide(tl.sum(result, axis=1, keep_dims=True), divisor, tl.float32)
            tl.store(pooled + target, result.to(pooled.dtype.element_ty), mask=exists)


@triton.jit
def activation_gradient(gradient, weights, mean, ACTIVATION: tl.constexpr):
    """Gradient by the masks from that by the weights; ``mean`` is its mean under the softmax."""
    if ACTIVATION == SOFTMAX:
        return weights * (gradient - mean)
    elif ACTIVATION == SIGMOID:
        return gradient * weights * (1.0 - weights)
    else:
        return gradient


@triton.jit
def peak_gradient(grad_visibility, peaks, at, position, mask):
    """Gradient of the visibilities numbered ``at``, at their peaks."""
    peak = tl.load(peaks + at, mask=mask, other=-1)
    return tl.where(peak == position, tl.load(grad_visibility + at, mask=mask, other=0.0), 0.0)


@triton.jit
def scaled_weights(
    masks,
    totals,
    first,
    position,
    inside,
    positions,
    eps,
    largest,
    total,
    CHANNELS: tl.constexpr,
    BACKGROUND: tl.constexpr,
    MODE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Weights over their part's divisor, 0 for the background: what token gradients are made of."""
    part = first + tl.arange(0, BLOCK_P) - BACKGROUND
    exists = (part >= 0) & (part < CHANNELS - BACKGROUND)
    weights = part_weights(
        masks, first, position, inside, positions, largest, total, CHANNELS, ACTIVATION, BLOCK_P
    )
    sums = tl.load(totals + part, mask=exists, other=1.0)
    weights = weights / divisors(sums, positions, eps, MODE)[:, None, None]
    return tl.where(exists[:, None, None], weights, 0.0)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    grad_pooled,
    grad_visibility,
    tokens,
    masks,
    totals,
    peaks,
    winners,
    grad_tokens,
    grad_weights,
    slopes,
    eps,
    prefix,
    positions,
    channels,
    mask_stride,
    blocks,
    CHANNELS: tl.constexpr,
    BACKGROUND: tl.constexpr,
    MODE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FINISH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ROUNDS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Token gradients of a block of a sample's positions, and what its mask gradients need.

    That is, of ``d[p, n] = sum_c grad_pooled[p, c] x[n, c] / divisor[p]``, the tokens being walked
    along their channels: ``d`` itself in ``grad_weights [B, CHANNELS, N]``, and in
    ``slopes [B, blocks, CHANNELS]`` the block's part of the total's gradient,
    ``sum_n w d / total``. With ``FINISH``, which takes all of a sample's slopes (so there is one
    block or no mean weighted) and all channels at once, the mask gradients themselves.
    """
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    block = program % blocks
    parts: tl.constexpr = CHANNELS - BACKGROUND
    masks += sample * mask_stride
    head = sample * (prefix + positions) * channels
    lane_value = tl.arange(0, LANES)[:, None] * VALUES + tl.arange(0, VALUES)[None, :]
    if block == 0:
        for row in range(prefix):
            for start in range(0, channels, LANES * VALUES):
                column = start + lane_value
                zeros = tl.zeros((LANES, VALUES), grad_tokens.dtype.element_ty)
                at = head + tl.cast(row, tl.int64) * channels + column
                tl.store(grad_tokens + at, zeros, mask=column < channels)

    start_row = block * (ROUNDS * ROWS)
    round_row = tl.arange(0, ROUNDS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    position = start_row + round_row
    inside = position < positions
    head += (prefix + start_row).to(tl.int64) * channels
    # Tiles are [part, round, row, lane, value]; a block of tokens lies within 32 bits.
    column = lane_value[None, None, None, :, :]
    offset = round_row[None, :, :, None, None] * channels + column
    here = position[None, :, :, None, None]
    in_map = inside[None, :, :, None, None]
    # Every row has its own copy, for gradients of the pooled parts to come where tokens come.
    copies = tl.zeros((ROWS,), tl.int32)[None, None, :, None, None]
    largest, total = softmax_scale(
        masks, position, inside, positions, CHANNELS, ACTIVATION, BLOCK_P
    )

    for first in range(0, CHANNELS, BLOCK_P):
        channel = first + tl.arange(0, BLOCK_P)
        part = channel - BACKGROUND
        exists = (part >= 0) & (channel < CHANNELS)
        at = (sample * parts + part) * channels
        source = at[:, None, None, None, None] + copies + column
        dots = tl.zeros((BLOCK_P, ROUNDS, ROWS, LANES), tl.float32)
        for start in range(0, channels, LANES * VALUES):
            in_row = start + column < channels
            values = tl.load(tokens + head + start + offset, mask=in_map & in_row, other=0.0)
            mask = exists[:, None, None, None, None] & in_row & (copies == 0)
            gradient = tl.load(grad_pooled + start + source, mask=mask, other=0.0)
            products = gradient.to(tl.float32) * values.to(tl.float32)
            if MODE == MAX:
                winner = tl.load(winners + start + source, mask=mask, other=-1)
                products = tl.where(winner == here, products, 0.0)
            dots = accumulate(dots, products, 4, 0, VALUES)
        dots = tl.where(exists[:, None, None, None], dots, 0.0)  # as in the forward kernel
        sums = tl.load(totals + sample * parts + part, mask=exists, other=1.0)
        divisor = divisors(sums, positions, eps, MODE)[:, None, None]
        gradient = tl.sum(dots, axis=3) / divisor
        weights = part_weights(
            masks, first, position, inside, positions, largest, total,
            CHANNELS, ACTIVATION, BLOCK_P,
        )  # fmt: skip
        channel = channel[:, None, None]
        if MODE == WEIGHTED_MEAN:
            # A clamped total has no gradient.
            slope = tl.sum(weights * gradient, axis=2, keep_dims=True)
            slope = tl.sum(slope, axis=1, keep_dims=True) / divisor
            slope = tl.where((exists & (sums >= eps))[:, None, None], slope, 0.0)
            if FINISH:
                gradient -= slope
            else:
                at = (sample * blocks + block) * CHANNELS + channel
                tl.store(slopes + at, slope, mask=channel < CHANNELS)
        if FINISH:
            at = (sample * parts + part)[:, None, None]
            is_part = exists[:, None, None]
            gradient += peak_gradient(grad_visibility, peaks, at, position[None, :, :], is_part)
            gradient = tl.where(is_part, gradient, 0.0)
            mean = tl.sum(weights * gradient, axis=0)[None, :, :]
            gradient = activation_gradient(gradient, weights, mean, ACTIVATION)
        at = sample * CHANNELS * positions + channel * positions + position[None, :, :]
        tl.store(grad_weights + at, gradient, mask=(channel < CHANNELS) & inside[None, :, :])

    scaled = scaled_weights(
        masks, totals + sample * parts, 0, position, inside, positions, eps, largest, total,
        CHANNELS, BACKGROUND, MODE, ACTIVATION, BLOCK_P,
    )  # fmt: skip
    for start in range(0, channels, LANES * VALUES):
        in_row = start + column < channels
        result = tl.zeros((ROUNDS, ROWS, LANES, VALUES), tl.float32)
        for first in range(0, CHANNELS, BLOCK_P):
            if CHANNELS > BLOCK_P:
                scaled = scaled_weights(
                    masks, totals + sample * parts, first, position, inside, positions, eps,
                    largest, total, CHANNELS, BACKGROUND, MODE, ACTIVATION, BLOCK_P,
                )  # fmt: skip
            channel = first + tl.arange(0, BLOCK_P)
            part = channel - BACKGROUND
            at = (sample * parts + part) * channels
            source = at[:, None, None, None, None] + copies + column
            exists = ((part >= 0) & (channel < CHANNELS))[:, None, None, None, None]
            mask = exists & in_row & (copies == 0)
            gradient = tl.load(grad_pooled + start + source, mask=mask, other=0.0)
            products = scaled[:, :, :, None, None] * gradient.to(tl.float32)
            if MODE == MAX:
                winner = tl.load(winners + start + source, mask=mask, other=-1)
                products = tl.where(winner == here, products, 0.0)
            if CHANNELS > BLOCK_P:
                result = accumulate(result, products, 0, 0, BLOCK_P)
            else:
                result = accumulate(result, products, 0, BACKGROUND, CHANNELS)
        target = grad_tokens + head + start + offset
        tl.store(target, result[None].to(grad_tokens.dtype.element_ty), mask=in_map & in_row)


@triton.jit
def summed_gradient(
    grad_visibility,
    peaks,
    grad_weights,
    slopes,
    begin,
    samples,
    blocks,
    first,
    position,
    inside,
    positions,
    CHANNELS: tl.constexpr,
    BACKGROUND: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Gradient by the weights ``[BLOCK_P, 1, SPAN]``, summed over samples in a fixed order."""
    parts: tl.constexpr = CHANNELS - BACKGROUND
    channel = first + tl.arange(0, BLOCK_P)[None, :, None]
    exists = (channel >= BACKGROUND) & (channel < CHANNELS)
    result = tl.zeros((BLOCK_P, position.shape[1]), tl.float32)
    for index in range(0, samples, BLOCK_S):
        sample = index + tl.arange(0, BLOCK_S)[:, None, None]
        mask = exists & (sample < samples)
        sample = begin + sample
        at = (sample * CHANNELS + channel) * positions + position[None, :, :]
        values = tl.load(grad_weights + at, mask=mask & inside[None, :, :], other=0.0)
        at = sample * parts + channel - BACKGROUND
        values += peak_gradient(grad_visibility, peaks, at, position[None, :, :], mask)
        result += tl.sum(values, axis=0)
    slope = tl.zeros((BLOCK_P, 1), tl.float32)
    for index in range(0, samples * blocks, BLOCK_S):
        entry = index + tl.arange(0, BLOCK_S)[:, None, None]
        mask = exists & (entry < samples * blocks)
        at = (begin * blocks + entry) * CHANNELS + channel
        slope += tl.sum(tl.load(slopes + at, mask=mask, other=0.0), axis=0)
    return (result - slope)[:, None, :]


@triton.jit(do_not_specialize=SIZES)
def finish_kernel(
    masks,
    grad_visibility,
    peaks,
    grad_weights,
    slopes,
    grad_masks,
    positions,
    mask_stride,
    blocks,
    samples,
    tiles,
    CHANNELS: tl.constexpr,
    BACKGROUND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Mask gradients of ``SPAN`` positions, summed over the ``samples`` that share the masks."""
    program = tl.program_id(0)
    masks_index = (program // tiles).to(tl.int64)
    position = (program % tiles) * SPAN + tl.arange(0, SPAN)[None, :]
    inside = position < positions
    masks += masks_index * mask_stride
    grad_masks += masks_index * mask_stride
    begin = masks_index * samples
    largest, total = softmax_scale(
        masks, position, inside, positions, CHANNELS, ACTIVATION, BLOCK_P
    )
    mean = tl.zeros((1, 1, SPAN), tl.float32)
    if ACTIVATION == SOFTMAX:
        for first in range(0, CHANNELS, BLOCK_P):
            weights = part_weights(
                masks, first, position, inside, positions, largest, total,
                CHANNELS, ACTIVATION, BLOCK_P,
            )  # fmt: skip
            gradient = summed_gradient(
                grad_visibility, peaks, grad_weights, slopes, begin, samples, blocks, first,
                position, inside, positions, CHANNELS, BACKGROUND, BLOCK_P, BLOCK_S,
            )  # fmt: skip
            mean += tl.sum(weights * gradient, axis=0, keep_dims=True)
    for first in range(0, CHANNELS, BLOCK_P):
        weights = part_weights(
            masks, first, position, inside, positions, largest, total,
            CHANNELS, ACTIVATION, BLOCK_P,
        )  # fmt: skip
        gradient = summed_gradient(
            grad_visibility, peaks, grad_weights, slopes, begin, samples, blocks, first,
            position, inside, positions, CHANNELS, BACKGROUND, BLOCK_P, BLOCK_S,
        )  # fmt: skip
        channel = first + tl.arange(0, BLOCK_P)[:, None, None]
        tl.store(
            grad_masks + channel * positions + position[None, :, :],
            activation_gradient(gradient, weights, mean, ACTIVATION),
            mask=(channel < CHANNELS) & inside[None, :, :],
        )
