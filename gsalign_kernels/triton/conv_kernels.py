"""The Triton kernel of the convolution, ReLU and mean: an implicit matrix product. Imports triton.

A program makes the responses of one image to some outputs, a stretch of the map at a time, and adds
them up in its registers: of the map only signs are written.
"""

# The decorator replaces the functions, so annotations would describe something else.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from gsalign_kernels.triton.common_kernels import divide


@triton.jit(do_not_specialize=["outputs", "height", "width", "prefix", "sign_bytes"])
def forward_kernel(
    tokens,
    weight,
    bias,
    mean,
    signs,
    image_stride,
    token_stride,
    channels,
    outputs,
    height,
    width,
    prefix,
    sign_bytes,
    output_blocks,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Means ``[B, O]`` and signs of the responses; ``weight`` is ``[9, C, O]``, tap by tap."""
    program = tl.program_id(0)
    image = (program // output_blocks).to(tl.int64)
    output = program % output_blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    exists = output < outputs
    shift = tl.load(bias + output, mask=exists, other=0.0)
    source = tokens + image * image_stride + prefix * token_stride
    total = tl.zeros((BLOCK_O,), tl.float32)
    positions = height * width
    for first in range(0, positions, BLOCK_N):
        position = first + tl.arange(0, BLOCK_N)
        y = position // width
        x = position % width
        sums = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
        for tap in range(9):
            dy = tap // 3 - 1
            dx = tap % 3 - 1
            inside = (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
            inside = inside & (position < positions)
            rows = source + (position + dy * width + dx)[:, None] * token_stride
            for start in range(0, channels, BLOCK_C):
                channel = start + tl.arange(0, BLOCK_C)
                within = channel < channels
                values = tl.load(
                    rows + channel[None, :], mask=inside[:, None] & within[None, :], other=0.0
                )
                kernel = tl.load(
                    weight + (tap * channels + channel)[:, None] * outputs + output[None, :],
                    mask=within[:, None] & exists[None, :],
                    other=0.0,
                )
                sums = tl.dot(values, kernel, sums, input_precision=PRECISION)
        response = sums + shift[None, :]
        # Not > 0: a NaN counts, as in PyTorch's ReLU.
        positive = (response <= 0.0) == 0
        counted = (position < positions)[:, None] & positive
        total += tl.sum(tl.where(counted, response, 0.0), axis=0)
        bits = tl.reshape(positive.to(tl.int32), (BLOCK_N, BLOCK_O // 8, 8))
        packed = tl.sum(bits << tl.arange(0, 8)[None, None, :], axis=2)
        byte = program % output_blocks * (BLOCK_O // 8) + tl.arange(0, BLOCK_O // 8)
        tl.store(
            signs + (image * positions + position)[:, None] * sign_bytes + byte[None, :],
            packed.to(tl.uint8),
            mask=(position < positions)[:, None] & (byte < sign_bytes)[None, :],
        )
    tl.store(
        mean + image * outputs + output,
        divide(total, positions.to(tl.float32), tl.float32),
        mask=exists,
    )
