"""What the Triton kernels of the masked part pooling share: the weights that masks stand for.

Everything here is about positions ``[SPAN]`` of one sample, channel by channel: a channel of the
masks is a part, or the background before the parts. Channels come in groups of ``GROUP``, whose
loads are unrolled and so under way together. Imports triton.
"""

# The decorator replaces the functions, so annotations would describe something else.
# mypy: ignore-errors
# Triton's tuples can be added and not unpacked.
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

# Modes and activations, as the operators number them.
WEIGHTED_MEAN = tl.constexpr(0)
MAX = tl.constexpr(2)
SOFTMAX = tl.constexpr(1)
SIGMOID = tl.constexpr(2)

NOWHERE = tl.constexpr(2**31 - 1)
"""A position behind every other."""


@triton.jit
def softmax_scale(
    masks,
    position,
    inside,
    positions,
    CHANNELS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GROUP: tl.constexpr,
):
    """What the softmax at each position subtracts and divides by; unused by other activations."""
    largest = tl.full(position.shape, -float("inf"), tl.float32)
    total = tl.zeros(position.shape, tl.float32)
    if ACTIVATION == SOFTMAX:
        for first in range(0, CHANNELS, GROUP):
            for k in tl.static_range(GROUP):
                exists = inside & (first + k < CHANNELS)
                at = masks + (first + k) * positions + position
                largest = tl.maximum(largest, tl.load(at, mask=exists, other=-float("inf")))
        for first in range(0, CHANNELS, GROUP):
            for k in tl.static_range(GROUP):
                exists = inside & (first + k < CHANNELS)
                at = masks + (first + k) * positions + position
                total += tl.exp(tl.load(at, mask=exists, other=-float("inf")) - largest)
    return largest, total


@triton.jit
def channel_weight(
    masks, channel, position, exists, positions, largest, total, ACTIVATION: tl.constexpr
):
    """Weight of one channel at each position; 0 where there is none."""
    value = tl.load(masks + channel * positions + position, mask=exists, other=0.0)
    if ACTIVATION == SOFTMAX:
        value = tl.exp(value - largest) / total
    elif ACTIVATION == SIGMOID:
        value = 1.0 / (1.0 + tl.exp(-value))
    return tl.where(exists, value, 0.0)


@triton.jit
def divisor_of(total, positions, eps, MODE: tl.constexpr):
    """What a sum of ``m x`` is divided by, as ``divisor()`` in ``csrc/pool/pool.h``; maxima 1."""
    if MODE == WEIGHTED_MEAN:
        return tl.where(total < eps, eps, total)
    elif MODE == MAX:
        return 1.0
    else:
        return positions.to(tl.float32)


@triton.jit
def takes_over(value, largest):
    """Whether a value replaces the largest one before it: so does the first NaN, and no equal."""
    return ~(value <= largest) & (largest == largest)


@triton.jit
def first_largest(value, position, AXIS: tl.constexpr):
    """Largest value along an axis, NaN above all numbers, and its first position."""
    unordered = value != value
    broken = tl.max(unordered.to(tl.int32), axis=AXIS) > 0
    largest = tl.max(value, axis=AXIS)
    equal = value == tl.expand_dims(largest, AXIS)
    here = tl.where(tl.expand_dims(broken, AXIS), unordered, equal)
    first = tl.min(tl.where(here, position, NOWHERE), axis=AXIS)
    return tl.where(broken, float("nan"), largest), first


@triton.jit
def side_by_side(tiles, COUNT: tl.constexpr):
    """Up to 8 tiles as one, along a new last axis that zeros fill up to a power of two.

    A thread holds all of that axis, so nothing moves; what is summed afterwards is so for all tiles
    at once, between the same barriers.
    """
    width: tl.constexpr = triton.next_power_of_2(COUNT)
    shape: tl.constexpr = tiles[0].shape
    for _ in tl.static_range(width - COUNT):
        tiles = tiles + (tl.zeros_like(tiles[0]),)
    for level in tl.static_range(3):
        if width > 1 << level:
            joined = ()
            for index in tl.static_range(width >> (level + 1)):
                pair = tl.join(tiles[index], tiles[index + (width >> (level + 1))])
                joined = joined + (pair,)
            tiles = joined
    if len(shape) == 1:
        return tl.reshape(tiles[0], [shape[0], width])
    else:
        return tl.reshape(tiles[0], [shape[0], shape[1], width])


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
    GROUP: tl.constexpr,
):
    """The first channel with the largest weight at each position, -1 where none is positive.

    And where one is NaN: that one leads, and is not positive.
    """
    leader = tl.full(position.shape, -1, tl.int32)
    lead = tl.zeros(position.shape, tl.float32)
    for first in range(0, CHANNELS, GROUP):
        for k in tl.static_range(GROUP):
            channel = first + k
            exists = inside & (channel < CHANNELS)
            weight = channel_weight(
                masks, channel, position, exists, positions, largest, total, ACTIVATION
            )
            better = takes_over(weight, lead)
            lead = tl.where(better, weight, lead)
            leader = tl.where(better, channel, leader)
    return tl.where(lead > 0.0, leader, -1)


@triton.jit
def summarize(
    masks,
    visibility,
    totals,
    peaks,
    first_part,
    positions,
    CHANNELS: tl.constexpr,
    BACKGROUND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BINARY: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Sum of the weights, visibility and peak of ``PARTS`` parts of a sample."""
    place = tl.arange(0, SPAN)
    sums = ()
    seen = ()
    peak = ()
    for _ in tl.static_range(PARTS):
        sums = sums + (tl.zeros((SPAN,), tl.float32),)
        seen = seen + (tl.full((SPAN,), 0.0 if BINARY else -float("inf"), tl.float32),)
        peak = peak + (tl.where(place < positions, place, NOWHERE),)
    for start in range(0, positions, SPAN):
        position = start + place
        inside = position < positions
        largest, total = softmax_scale(
            masks, position, inside, positions, CHANNELS, ACTIVATION, GROUP
        )
        if BINARY:
            leader = leading_channel(
                masks, position, inside, positions, largest, total, CHANNELS, ACTIVATION, GROUP
            )
        new_sums = ()
        new_seen = ()
        new_peak = ()
        for k in tl.static_range(PARTS):
            channel = BACKGROUND + first_part + k
            exists = inside & (channel < CHANNELS)
            weight = channel_weight(
                masks, channel, position, exists, positions, largest, total, ACTIVATION
            )
            new_sums = new_sums + (sums[k] + weight,)
            if BINARY:
                new_seen = new_seen + (tl.where(leader == channel, 1.0, seen[k]),)
                new_peak = new_peak + (peak[k],)
            else:
                better = exists & takes_over(weight, seen[k])
                new_seen = new_seen + (tl.where(better, weight, seen[k]),)
                new_peak = new_peak + (tl.where(better, position, peak[k]),)
        sums = new_sums
        seen = new_seen
        peak = new_peak
    count: tl.constexpr = triton.next_power_of_2(PARTS)
    part = first_part + tl.arange(0, count)
    exists = (tl.arange(0, count) < PARTS) & (part < CHANNELS - BACKGROUND)
    sums = side_by_side(sums, PARTS)
    seen = side_by_side(seen, PARTS)
    peak = side_by_side(peak, PARTS)
    tl.store(totals + part, tl.sum(sums, axis=0), mask=exists)
    if BINARY:
        seen = tl.max(seen, axis=0)
        peak = tl.full((count,), -1, tl.int32)
    else:
        seen, peak = first_largest(seen, peak, 0)
    tl.store(visibility + part, seen, mask=exists)
    tl.store(peaks + part, peak, mask=exists)
