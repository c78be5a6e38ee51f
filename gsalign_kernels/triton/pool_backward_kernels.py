"""Backward Triton kernels of the masked part pooling; ``pool_kernels.py`` tells of the design."""

# The decorator replaces the functions, so annotations would describe something else.
# mypy: ignore-errors
# Triton's tuples can be added and not unpacked.
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from gsalign_kernels.triton.pool_weights_kernels import (
    MAX,
    SIGMOID,
    SOFTMAX,
    WEIGHTED_MEAN,
    channel_weight,
    divisor_of,
    side_by_side,
    softmax_scale,
)

# Sizes of which a new value must not mean a new compilation. The number of channels of the tokens
# is not among them: knowing that 16 divides it gives 16-byte accesses.
SIZES = ["prefix", "positions", "mask_stride", "tiles", "blocks", "samples"]


@triton.jit
def values_apart(tile, VALUES: tl.constexpr):
    """A tile ``[ROWS, LANES * VALUES]`` as ``VALUES`` tiles ``[ROWS, LANES]``.

    Threads hold ``VALUES`` neighbours each, so nothing moves. They come even ones first, at every
    level; :func:`values_together` knows.
    """
    tiles = (tile,)
    count: tl.constexpr = tile.shape[1]
    for level in tl.static_range(4):
        if 1 << level < VALUES:
            halves = ()
            for index in tl.static_range(1 << level):
                pairs = tl.reshape(tiles[index], [tile.shape[0], count // (2 << level), 2])
                even, odd = tl.split(pairs)
                halves = halves + (even, odd)
            tiles = halves
    return tiles


@triton.jit
def values_together(tiles, VALUES: tl.constexpr):
    """The tile that :func:`values_apart` took apart."""
    rows: tl.constexpr = tiles[0].shape[0]
    count: tl.constexpr = tiles[0].shape[1] * VALUES
    for level in tl.static_range(3, -1, -1):
        if 1 << level < VALUES:
            joined = ()
            for index in tl.static_range(1 << level):
                pair = tl.join(tiles[2 * index], tiles[2 * index + 1])
                joined = joined + (tl.reshape(pair, [rows, count // (1 << level)]),)
            tiles = joined
    return tiles[0]


@triton.jit
def activation_gradient(gradient, weight, mean, ACTIVATION: tl.constexpr):
    """Gradient by a mask from that by its weight; ``mean`` is its mean under the softmax."""
    if ACTIVATION == SOFTMAX:
        return weight * (gradient - mean)
    elif ACTIVATION == SIGMOID:
        return gradient * weight * (1.0 - weight)
    else:
        return gradient


@triton.jit
def scaled_weights(
    masks,
    totals,
    first_part,
    first_row,
    positions,
    eps,
    CHANNELS: tl.constexpr,
    BACKGROUND: tl.constexpr,
    MODE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    ROUNDS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Weights ``[ROWS]`` over their part's divisor, part by part and in it round by round."""
    divisors = ()
    for k in tl.static_range(PARTS):
        is_part = first_part + k < CHANNELS - BACKGROUND
        total = tl.load(totals + first_part + k, mask=is_part, other=1.0)
        divisors = divisors + (divisor_of(total, positions, eps, MODE),)
    weights = ()
    scales = ()
    for index in tl.static_range(ROUNDS):
        position = first_row + index * ROWS + tl.arange(0, ROWS)
        scales = scales + softmax_scale(
            masks, position, position < positions, positions, CHANNELS, ACTIVATION, GROUP
        )
    for k in tl.static_range(PARTS):
        channel = BACKGROUND + first_part + k
        for index in tl.static_range(ROUNDS):
            position = first_row + index * ROWS + tl.arange(0, ROWS)
            exists = (position < positions) & (channel < CHANNELS)
            weight = channel_weight(
                masks, channel, position, exists, positions,
                scales[2 * index], scales[2 * index + 1], ACTIVATION,
            )  # fmt: skip
            weights = weights + (weight / divisors[k],)
    return weights


@triton.jit
def load_chunk(pointers, mask, WHOLE: tl.constexpr):
    """A tile; 0 in columns that do not exist."""
    if WHOLE:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def walk(
    grad_pooled,
    winners,
    tokens,
    grad_tokens,
    masks,
    totals,
    weights,
    first_part,
    end_part,
    first_row,
    positions,
    channels,
    eps,
    CHANNELS: tl.constexpr,
    BACKGROUND: tl.constexpr,
    MODE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DOTS: tl.constexpr,
    BACK: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    ROUNDS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    VALUES: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Goes along the channels of a block of rows with parts ``first_part`` to ``end_part``.

    Returns, if ``DOTS``, for the ``PARTS`` parts of one group and the rounds in them the lanes'
    shares ``[ROWS, LANES]`` of the dot products of tokens and gradients of pooled parts. If
    ``BACK``, writes the gradients of the tokens, with the group's ``weights`` if there is but one.
    """
    parts: tl.constexpr = CHANNELS - BACKGROUND
    alone: tl.constexpr = PARTS == parts
    row = tl.arange(0, ROWS)
    lane_value = tl.arange(0, LANES * VALUES)[None, :]
    # Rows behind the last one read the last one, for nobody.
    last = positions - 1 - first_row
    # Every row has its own copy of the gradients, so that they come where the tokens come.
    copies = row[:, None] * 0 + lane_value
    dots = ()
    for _ in tl.static_range(PARTS * ROUNDS if DOTS else 0):
        dots = dots + (tl.zeros((ROWS, LANES), tl.float32),)
    for start in range(0, channels, LANES * VALUES):
        in_row = start + lane_value < channels
        x = ()
        back = ()
        for index in tl.static_range(ROUNDS):
            if DOTS:
                at = tl.minimum(index * ROWS + row, last)[:, None] * channels + lane_value
                tile = load_chunk(tokens + start + at, in_row, WHOLE)
                x = x + (values_apart(tile.to(tl.float32), VALUES),)
            nothing = ()
            for _ in tl.static_range(VALUES):
                nothing = nothing + (tl.zeros((ROWS, LANES), tl.float32),)
            back = back + (nothing,)
        for first in range(first_part, end_part, PARTS):
            scaled = weights
            if not alone and BACK:
                scaled = scaled_weights(
                    masks, totals, first, first_row, positions, eps,
                    CHANNELS, BACKGROUND, MODE, ACTIVATION, PARTS, GROUP, ROUNDS, ROWS,
                )  # fmt: skip
            new_dots = ()
            for k in tl.static_range(PARTS):
                is_part = in_row & (first + k < parts)
                source = tl.cast(first + k, tl.int64) * channels + start + copies
                sent = load_chunk(grad_pooled + source, is_part, WHOLE and alone)
                gradient = values_apart(sent.to(tl.float32), VALUES)
                winner = gradient
                if MODE == MAX:
                    found = load_chunk(winners + source, is_part, WHOLE and alone)
                    winner = values_apart(found - first_row, VALUES)
                new_back = ()
                for index in tl.static_range(ROUNDS):
                    here = (index * ROWS + row)[:, None]
                    if DOTS:
                        dot = dots[k * ROUNDS + index]
                        for value in tl.static_range(VALUES):
                            added = dot + x[index][value] * gradient[value]
                            if MODE == MAX:
                                added = tl.where(winner[value] == here, added, dot)
                            dot = added
                        new_dots = new_dots + (dot,)
                    if BACK:
                        weight = scaled[k * ROUNDS + index][:, None]
                        after = ()
                        for value in tl.static_range(VALUES):
                            added = back[index][value] + weight * gradient[value]
                            if MODE == MAX:
                                added = tl.where(winner[value] == here, added, back[index][value])
                            after = after + (added,)
                        new_back = new_back + (after,)
                if BACK:
                    back = new_back
            dots = new_dots
        for index in tl.static_range(ROUNDS if BACK else 0):
            at = (index * ROWS + row)[:, None] * channels + lane_value
            exists = (index * ROWS + row <= last)[:, None] & in_row
            result = values_together(back[index], VALUES).to(grad_tokens.dtype.element_ty)
            tl.store(grad_tokens + start + at, result, mask=exists)
    return dots


@triton.jit
def peak_gradient(grad_visibility, peaks, at, position, exists):
    """Gradient of the visibility numbered ``at``, where its peak is."""
    peak = tl.load(peaks + at, mask=exists, other=-1)
    return tl.where(peak == position, tl.load(grad_visibility + at, mask=exists, other=0.0), 0.0)


@triton.jit
def finish_rows(
    masks,
    grad_visibility,
    peaks,
    grad_masks,
    gradients,
    first_row,
    positions,
    CHANNELS: tl.constexpr,
    BACKGROUND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GROUP: tl.constexpr,
    ROUNDS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Mask gradients of a block of rows from ``gradients`` by the weights of all parts."""
    for index in tl.static_range(ROUNDS):
        position = first_row + index * ROWS + tl.arange(0, ROWS)
        inside = position < positions
        largest, total = softmax_scale(
            masks, position, inside, positions, CHANNELS, ACTIVATION, GROUP
        )
        found = ()
        weights = ()
        mean = tl.zeros((ROWS,), tl.float32)
        for channel in tl.static_range(CHANNELS):
            weight = channel_weight(
                masks, channel, position, inside, positions, largest, total, ACTIVATION
            )
            gradient = tl.zeros((ROWS,), tl.float32)
            if channel >= BACKGROUND:
                gradient = gradients[(channel - BACKGROUND) * ROUNDS + index]
                gradient += peak_gradient(
                    grad_visibility, peaks, channel - BACKGROUND, position, True
                )
            mean += weight * gradient
            found = found + (gradient,)
            weights = weights + (weight,)
        for channel in tl.static_range(CHANNELS):
            gradient = activation_gradient(found[channel], weights[channel], mean, ACTIVATION)
            tl.store(grad_masks + channel * positions + position, gradient, mask=inside)


@triton.jit
def group_gradients(
    grad_pooled,
    grad_visibility,
    tokens,
    masks,
    totals,
    peaks,
    winners,
    grad_tokens,
    grad_masks,
    grad_weights,
    slopes,
    eps,
    first_part,
    first_row,
    positions,
    channels,
    CHANNELS: tl.constexpr,
    BACKGROUND: tl.constexpr,
    MODE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FINISH: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    ROUNDS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    VALUES: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """What a group of parts sends to its weights; and to the tokens, if it is the only one."""
    parts: tl.constexpr = CHANNELS - BACKGROUND
    weights = scaled_weights(
        masks, totals, first_part, first_row, positions, eps,
        CHANNELS, BACKGROUND, MODE, ACTIVATION, PARTS, GROUP, ROUNDS, ROWS,
    )  # fmt: skip
    dots = walk(
        grad_pooled, winners, tokens, grad_tokens, masks, totals, weights,
        first_part, first_part + PARTS, first_row, positions, channels, eps,
        CHANNELS, BACKGROUND, MODE, ACTIVATION, True, PARTS == parts,
        PARTS, GROUP, ROUNDS, ROWS, LANES, VALUES, WHOLE,
    )  # fmt: skip
    gradients = ()
    for k in tl.static_range(PARTS):
        total = tl.load(totals + first_part + k, mask=first_part + k < parts, other=1.0)
        divisor = divisor_of(total, positions, eps, MODE)
        for index in tl.static_range(ROUNDS):
            gradients = gradients + (tl.sum(dots[k * ROUNDS + index], axis=1) / divisor,)
    if FINISH:
        finish_rows(
            masks, grad_visibility, peaks, grad_masks, gradients,
            first_row, positions, CHANNELS, BACKGROUND, ACTIVATION, GROUP, ROUNDS, ROWS,
        )  # fmt: skip
    else:
        part = first_part + tl.arange(0, triton.next_power_of_2(PARTS))
        is_part = (part < first_part + PARTS) & (part < parts)
        share = tl.zeros((ROWS, triton.next_power_of_2(PARTS)), tl.float32)
        for index in tl.static_range(ROUNDS):
            row = first_row + index * ROWS + tl.arange(0, ROWS)[:, None]
            exists = (row < positions) & is_part[None, :]
            gradient = ()
            weight = ()
            for k in tl.static_range(PARTS):
                gradient = gradient + (gradients[k * ROUNDS + index],)
                weight = weight + (weights[k * ROUNDS + index],)
            gradient = side_by_side(gradient, PARTS)
            tl.store(grad_weights + part[None, :] * positions + row, gradient, mask=exists)
            share += tl.where(exists, side_by_side(weight, PARTS) * gradient, 0.0)
        if MODE == WEIGHTED_MEAN:
            # A sum below eps was not divided by.
            total = tl.load(totals + part, mask=is_part, other=0.0)
            slope = tl.where(total >= eps, tl.sum(share, axis=0), 0.0)
            tl.store(slopes + part, slope, mask=is_part)


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
    grad_masks,
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
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    ROUNDS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    VALUES: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Token gradients of a block of a sample's positions, and what its mask gradients need.

    That is, of ``d[p, n] = sum_c grad_pooled[p, c] x[n, c] / divisor[p]``: ``d`` itself in
    ``grad_weights [B, P, N]``, and in a weighted mean in ``slopes [B, blocks, P]`` the block's part
    of the total's gradient, ``sum_n m d / total``. With ``FINISH``, for which nothing else must
    come in and one group must hold all parts, the mask gradients themselves.
    """
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    block = program % blocks
    first_row = block * (ROUNDS * ROWS)
    parts: tl.constexpr = CHANNELS - BACKGROUND
    masks += sample * mask_stride
    grad_masks += sample * mask_stride
    grad_pooled += sample * parts * channels
    winners += sample * parts * channels
    grad_visibility += sample * parts
    totals += sample * parts
    peaks += sample * parts
    grad_weights += sample * parts * positions
    slopes += (sample * blocks + block) * parts
    head = sample * (prefix + positions) * channels
    if block == 0:
        zeros = tl.zeros((LANES * VALUES,), grad_tokens.dtype.element_ty)
        for before in range(prefix):
            for start in range(0, channels, LANES * VALUES):
                column = start + tl.arange(0, LANES * VALUES)
                at = head + tl.cast(before, tl.int64) * channels + column
                tl.store(grad_tokens + at, zeros, mask=column < channels)

    head += (prefix + first_row).to(tl.int64) * channels
    tokens += head
    grad_tokens += head
    if PARTS == parts:
        group_gradients(
            grad_pooled, grad_visibility, tokens, masks, totals, peaks, winners, grad_tokens,
            grad_masks, grad_weights, slopes, eps, 0, first_row, positions, channels,
            CHANNELS, BACKGROUND, MODE, ACTIVATION, FINISH,
            PARTS, GROUP, ROUNDS, ROWS, LANES, VALUES, WHOLE,
        )  # fmt: skip
    else:
        for first_part in range(0, parts, PARTS):
            group_gradients(
                grad_pooled, grad_visibility, tokens, masks, totals, peaks, winners, grad_tokens,
                grad_masks, grad_weights, slopes, eps, first_part, first_row, positions, channels,
                CHANNELS, BACKGROUND, MODE, ACTIVATION, FINISH,
                PARTS, GROUP, ROUNDS, ROWS, LANES, VALUES, WHOLE,
            )  # fmt: skip
        walk(
            grad_pooled, winners, tokens, grad_tokens, masks, totals, (),
            0, parts, first_row, positions, channels, eps,
            CHANNELS, BACKGROUND, MODE, ACTIVATION, False, True,
            PARTS, GROUP, ROUNDS, ROWS, LANES, VALUES, WHOLE,
        )  # fmt: skip


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
    GROUP: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Mask gradients of ``SPAN`` positions, summed over the ``samples`` that share the masks.

    The sums are made in a fixed order.
    """
    program = tl.program_id(0)
    parts: tl.constexpr = CHANNELS - BACKGROUND
    masks_index = (program // tiles).to(tl.int64)
    begin = masks_index * samples
    position = program % tiles * SPAN + tl.arange(0, SPAN)
    inside = position < positions
    masks += masks_index * mask_stride
    grad_masks += masks_index * mask_stride
    largest, total = softmax_scale(masks, position, inside, positions, CHANNELS, ACTIVATION, GROUP)
    mean = tl.zeros((SPAN,), tl.float32)
    for first in range(0, CHANNELS, GROUP):
        for k in tl.static_range(GROUP):
            channel = first + k
            part = channel - BACKGROUND
            exists = (part >= 0) & (part < parts)
            gradient = tl.zeros((SPAN,), tl.float32)
            for index in range(0, samples, BLOCK_S):
                sample = index + tl.arange(0, BLOCK_S)[:, None]
                mask = exists & (sample < samples)
                at = (begin + sample) * parts + part
                values = tl.load(
                    grad_weights + at * positions + position[None, :],
                    mask=mask & inside[None, :],
                    other=0.0,
                )
                values += peak_gradient(grad_visibility, peaks, at, position[None, :], mask)
                gradient += tl.sum(values, axis=0)
            slope = tl.zeros((32,), tl.float32)
            for index in range(0, samples * blocks, 32):
                entry = index + tl.arange(0, 32)
                mask = exists & (entry < samples * blocks)
                at = (begin * blocks + entry) * parts + part
                slope += tl.load(slopes + at, mask=mask, other=0.0)
            gradient -= tl.sum(slope, axis=0)
            exists = inside & (channel < CHANNELS)
            if ACTIVATION != 0:
                weight = channel_weight(
                    masks, channel, position, exists, positions, largest, total, ACTIVATION
                )
                if ACTIVATION == SOFTMAX:
                    mean += weight * gradient  # and its share comes below
                else:
                    gradient = activation_gradient(gradient, weight, mean, ACTIVATION)
            tl.store(grad_masks + channel * positions + position, gradient, mask=exists)
    if ACTIVATION == SOFTMAX:
        tl.debug_barrier()
        for first in range(0, CHANNELS, GROUP):
            for k in tl.static_range(GROUP):
                channel = first + k
                exists = inside & (channel < CHANNELS)
                weight = channel_weight(
                    masks, channel, position, exists, positions, largest, total, ACTIVATION
                )
                at = grad_masks + channel * positions + position
                gradient = tl.load(at, mask=exists, other=0.0)
                gradient = activation_gradient(gradient, weight, mean, ACTIVATION)
                tl.store(at, gradient, mask=exists)
