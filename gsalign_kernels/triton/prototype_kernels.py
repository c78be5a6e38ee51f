"""Triton kernels of the masked prototype loss; the only file of it that imports triton.

The method is that of ``csrc/prototype/prototype_kernels.cuh``: two launches forward, one backward;
the first sample of a class owns it, lists its members from the labels and does the work of all.
Members are taken ``BLOCK_K`` at a time, so that a tile is nearly full for small classes too.

Bytes, for ``B * D`` values: ``means_kernel`` reads and writes one tensor, ``rows_kernel`` reads
three, ``backward_kernel`` reads two, writes two, and adds to one of those while it is in the cache.
A training batch lies in the L2 cache, and what counts is launches and reads that wait for others.
"""

# The decorator replaces the functions, so annotations would describe something else.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from gsalign_kernels.triton.common_kernels import divide

SMALLEST_NORM = tl.constexpr(1e-12)
SMALLEST_MASK = tl.constexpr(1e-6)
KEPT = tl.constexpr(4)
"""Scalars kept of a row: ``|f|``, ``|q|``, ``f q`` and ``|mean|``."""

# Sizes of which a new value must not mean a new compilation. The number of channels is not among
# them: knowing that 16 divides it gives 16-byte accesses.
SIZES = ["batch", "tiles"]


@triton.jit
def inverse_norm(norm):
    """What a vector of this norm is multiplied by; a NaN stays."""
    return divide(1.0, tl.where(norm < SMALLEST_NORM, SMALLEST_NORM, norm), tl.float32)


@triton.jit
def clamped_mask(mask):
    """What the logarithm of the entropy term is taken of; a NaN stays."""
    return tl.where(mask < SMALLEST_MASK, SMALLEST_MASK, mask)


@triton.jit
def same_label(labels, label, first, batch, BLOCK_B: tl.constexpr):
    """The samples of a window of the labels, and which of them have this label."""
    index = first + tl.arange(0, BLOCK_B)
    exists = index < batch
    return index, exists & (tl.load(labels + index, mask=exists, other=0) == label)


@triton.jit
def owns_class(labels, label, sample, BLOCK_B: tl.constexpr):
    """Whether no sample before this one has its label."""
    earlier = 0
    for first in range(0, sample, BLOCK_B):
        _, same = same_label(labels, label, first, sample, BLOCK_B)
        earlier = tl.maximum(earlier, tl.max(same.to(tl.int32), axis=0))
    return earlier == 0


@triton.jit
def members_from(index, same, start, BLOCK_K: tl.constexpr):
    """The members of a window from the ``start``-th on, in order."""
    place = tl.cumsum(same.to(tl.int32), axis=0) - 1
    wanted = start + tl.arange(0, BLOCK_K)
    here = same[:, None] & (place[:, None] == wanted[None, :])
    return tl.sum(tl.where(here, index[:, None], 0), axis=0)


@triton.jit(do_not_specialize=SIZES)
def means_kernel(
    features,
    labels,
    means,
    arrived,
    batch,
    channels,
    tiles,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``means[b]``: the mean of the class of sample ``b``, one tile of channels for a class.

    Sets ``arrived``, where the programs of the next launch announce themselves, to zero.
    """
    program = tl.program_id(0)
    if program == 0:
        tl.store(arrived, 0)
    sample = program // tiles
    channel = program % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    in_row = (channel < channels)[None, :]
    label = tl.load(labels + sample)
    if owns_class(labels, label, sample, BLOCK_B):
        start = sample // BLOCK_B * BLOCK_B
        total = tl.zeros((BLOCK_C,), tl.float32)
        members = 0
        for first in range(start, batch, BLOCK_B):
            index, same = same_label(labels, label, first, batch, BLOCK_B)
            count = tl.sum(same.to(tl.int32), axis=0)
            members += count
            for k in range(0, count, BLOCK_K):
                row = members_from(index, same, k, BLOCK_K).to(tl.int64)
                mask = (k + tl.arange(0, BLOCK_K) < count)[:, None] & in_row
                at = row[:, None] * channels + channel[None, :]
                total += tl.sum(tl.load(features + at, mask=mask, other=0.0), axis=0)
        mean = divide(total, members.to(tl.float32), tl.float32)[None, :]
        mean = tl.broadcast_to(mean, (BLOCK_K, BLOCK_C))
        for first in range(start, batch, BLOCK_B):
            index, same = same_label(labels, label, first, batch, BLOCK_B)
            count = tl.sum(same.to(tl.int32), axis=0)
            for k in range(0, count, BLOCK_K):
                row = members_from(index, same, k, BLOCK_K).to(tl.int64)
                mask = (k + tl.arange(0, BLOCK_K) < count)[:, None] & in_row
                tl.store(means + row[:, None] * channels + channel[None, :], mean, mask=mask)


@triton.jit
def row_of(features, masks, means, start, channel, channels):
    """The features, masks and class means of some channels of a row; zeros past the last."""
    exists = channel < channels
    at = start + channel
    f = tl.load(features + at, mask=exists, other=0.0)
    m = tl.load(masks + at, mask=exists, other=0.0)
    return f, m, tl.load(means + at, mask=exists, other=0.0)


@triton.jit(do_not_specialize=SIZES)
def rows_kernel(
    features,
    masks,
    means,
    norms,
    shares,
    arrived,
    alignment,
    entropy,
    elements,
    batch,
    channels,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """A sample's scalars, its distance and its sum of ``m log m``: ``shares [B, 2]``.

    The last program to come adds the shares, in the order of the samples whichever it is.
    """
    sample = tl.program_id(0)
    start = sample.to(tl.int64) * channels
    offset = tl.arange(0, BLOCK_C)

    by_feature = tl.zeros((BLOCK_C,), tl.float32)
    by_mean = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, channels, BLOCK_C):
        f, m, mu = row_of(features, masks, means, start, first + offset, channels)
        by_feature += f * f
        by_mean += mu * mu
    feature_norm = tl.sqrt_rn(tl.sum(by_feature, axis=0))
    mean_norm = tl.sqrt_rn(tl.sum(by_mean, axis=0))
    unit = inverse_norm(feature_norm)
    centre = inverse_norm(mean_norm)

    by_product = tl.zeros((BLOCK_C,), tl.float32)
    crossed = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, channels, BLOCK_C):
        f, m, mu = row_of(features, masks, means, start, first + offset, channels)
        q = centre * mu * m
        by_product += q * q
        crossed += f * q
    product_norm = tl.sqrt_rn(tl.sum(by_product, axis=0))
    feature_product = tl.sum(crossed, axis=0)
    pull = inverse_norm(product_norm)

    errors = tl.zeros((BLOCK_C,), tl.float32)
    logarithms = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, channels, BLOCK_C):
        f, m, mu = row_of(features, masks, means, start, first + offset, channels)
        error = unit * f - pull * (centre * mu * m)
        errors += error * error
        logarithms += m * tl.log(clamped_mask(m))

    kept = norms + sample.to(tl.int64) * KEPT
    tl.store(kept, feature_norm)
    tl.store(kept + 1, product_norm)
    tl.store(kept + 2, feature_product)
    tl.store(kept + 3, mean_norm)
    share = shares + sample.to(tl.int64) * 2
    tl.store(share, tl.sum(errors, axis=0))
    tl.store(share + 1, tl.sum(logarithms, axis=0))
    # All that the others must see is written before any thread of the program goes on.
    tl.debug_barrier()
    before = tl.atomic_add(arrived, 1, sem="acq_rel")
    if before == batch - 1:
        distance = tl.zeros((BLOCK_B,), tl.float32)
        logarithm = tl.zeros((BLOCK_B,), tl.float32)
        for first in range(0, batch, BLOCK_B):
            other = first + tl.arange(0, BLOCK_B)
            at = shares + other.to(tl.int64) * 2
            exists = other < batch
            distance += tl.load(at, mask=exists, other=0.0, cache_modifier=".cg")
            logarithm += tl.load(at + 1, mask=exists, other=0.0, cache_modifier=".cg")
        tl.store(alignment, divide(tl.sum(distance, axis=0), elements, tl.float32))
        tl.store(entropy, divide(-tl.sum(logarithm, axis=0), elements, tl.float32))


@triton.jit
def row_gradients(norms, row, exists, slope):
    """``feature``, ``cross``, ``product`` and ``along`` of rows, as in ``prototype.h``."""
    kept = norms + row * KEPT
    feature_norm = tl.load(kept, mask=exists, other=1.0)
    product_norm = tl.load(kept + 1, mask=exists, other=1.0)
    feature_product = tl.load(kept + 2, mask=exists, other=0.0)
    unit = inverse_norm(feature_norm)
    pull = inverse_norm(product_norm)
    cosine = feature_product * unit * pull
    clamped = product_norm < SMALLEST_NORM
    feature = slope * unit * unit * tl.where(feature_norm < SMALLEST_NORM, 1.0, cosine)
    cross = -slope * unit * pull
    product = slope * pull * pull * tl.where(clamped, 1.0, cosine)
    length = product_norm * pull
    along = tl.where(clamped & exists, slope * (length * length - cosine), 0.0)
    return feature[:, None], cross[:, None], product[:, None], along


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    features,
    masks,
    labels,
    means,
    norms,
    upstream_alignment,
    upstream_entropy,
    grad_features,
    grad_masks,
    elements,
    batch,
    channels,
    tiles,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Both gradients of the members of a class, one tile of channels."""
    program = tl.program_id(0)
    sample = program // tiles
    channel = program % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = channel < channels
    in_row = exists[None, :]
    label = tl.load(labels + sample)
    if owns_class(labels, label, sample, BLOCK_B):
        slope = divide(2.0 * tl.load(upstream_alignment), elements, tl.float32)
        entropy_slope = divide(tl.load(upstream_entropy), elements, tl.float32)
        mean_norm = tl.load(norms + sample.to(tl.int64) * KEPT + 3)
        centre = inverse_norm(mean_norm)
        mean = tl.load(means + sample.to(tl.int64) * channels + channel, mask=exists, other=0.0)
        c = (centre * mean)[None, :]
        start = sample // BLOCK_B * BLOCK_B

        # The gradients but for what comes through the class mean, which is a sum over the members:
        # of m times the gradient by q.
        total = tl.zeros((BLOCK_C,), tl.float32)
        along = 0.0
        members = 0
        for first in range(start, batch, BLOCK_B):
            index, same = same_label(labels, label, first, batch, BLOCK_B)
            count = tl.sum(same.to(tl.int32), axis=0)
            members += count
            for k in range(0, count, BLOCK_K):
                row = members_from(index, same, k, BLOCK_K).to(tl.int64)
                is_member = k + tl.arange(0, BLOCK_K) < count
                feature, cross, product, parts = row_gradients(norms, row, is_member, slope)
                along += tl.sum(parts, axis=0)
                mask = is_member[:, None] & in_row
                at = row[:, None] * channels + channel[None, :]
                f = tl.load(features + at, mask=mask, other=0.0)
                m = tl.load(masks + at, mask=mask, other=0.0)
                q = c * m
                tl.store(grad_features + at, feature * f + cross * q, mask=mask)
                by_product = cross * f + product * q
                total += tl.sum(tl.where(mask, by_product * m, 0.0), axis=0)
                raised = clamped_mask(m)
                free = tl.where(m < raised, 0.0, 1.0)
                grad = by_product * c - entropy_slope * (tl.log(raised) + free)
                tl.store(grad_masks + at, grad, mask=mask)
        share = divide(centre, members.to(tl.float32), tl.float32)
        radial = tl.where(mean_norm < SMALLEST_NORM, 0.0, share * centre * along)
        share = (share * total - radial * mean)[None, :]

        tl.debug_barrier()  # threads may read what others wrote
        for first in range(start, batch, BLOCK_B):
            index, same = same_label(labels, label, first, batch, BLOCK_B)
            count = tl.sum(same.to(tl.int32), axis=0)
            for k in range(0, count, BLOCK_K):
                row = members_from(index, same, k, BLOCK_K).to(tl.int64)
                mask = (k + tl.arange(0, BLOCK_K) < count)[:, None] & in_row
                at = grad_features + row[:, None] * channels + channel[None, :]
                tl.store(at, tl.load(at, mask=mask, other=0.0) + share, mask=mask)
