"""Masked part pooling in Triton: ``gsalign_triton::masked_part_pool`` and its backward pass."""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gsalign_kernels.triton.launch import (
    ceil_div,
    check_available,
    check_like,
    checked_grid,
    device_of,
    empty_output,
    interpreted,
    power_of_two,
)

MAX_SPAN = 2**31 - 2**20
"""Most values of a sample's masks, and of the tokens of a tile: their offsets have 32 bits."""

_WEIGHTED_MEAN, _MAX = 0, 2
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_WARPS = 4
_BACKWARD_WARPS = 8
_REGISTERS = 128  # of a thread backward: two programs on a multiprocessor
_MOST_ROWS = 1024  # of a block of rows


@lru_cache(maxsize=1)
def _kernels() -> Any:
    return importlib.import_module("gsalign_kernels.triton.pool_kernels")


def _vector(tokens: Tensor) -> int:
    """Values of a row in 16 bytes; 1 where 16 does not divide the row."""
    return 16 // tokens.element_size() if tokens.shape[2] % 16 == 0 else 1


def _threads(warps: int) -> int:
    """Of a program. The interpreter takes as long for one value as for many: there it has more."""
    return 32 * warps * (8 if interpreted() else 1)


def _rounds(positions: int, rows: int, most: int) -> int:
    return power_of_two(ceil_div(positions, rows), 1, 2 if interpreted() else most)


def part_groups(parts: int, most: int) -> tuple[int, int]:
    """Groups that the parts are worked on in, and how many are in each: nearly the same."""
    groups = ceil_div(parts, most)
    return groups, ceil_div(parts, groups)


def forward_blocks(tokens: Tensor, positions: int, parts: int, mode: int) -> dict[str, int | bool]:
    """Sizes of a program's tile, by the vectors that 128 threads hold: up to 128 channels.

    Then up to four such tiles at once. Where there are no vectors a thread has 4 values, 32 apart.
    Sums take a register per part and value, maxima two, and more where vectors are none.
    """
    values = max(_vector(tokens), 4)
    few = mode == _MAX and _vector(tokens) != 4
    block_c = power_of_two(tokens.shape[2], 16, 128)
    rows = _threads(_WARPS) * values // block_c
    return {
        "PARTS": part_groups(parts, 4 if few else 8)[1],
        "ROUNDS": _rounds(positions, rows, 8 if values == 4 else 4),
        "ROWS": rows,
        "BLOCK_C": block_c,
        "WHOLE": tokens.shape[2] % block_c == 0,
    }


def backward_blocks(tokens: Tensor, positions: int, parts: int, mode: int) -> dict[str, int | bool]:
    """The same for the backward pass: 32 lanes along a row, where it is long enough.

    Winners come with the gradients of maxima, four in 16 bytes. Two rows of a thread share the
    gradients of pooled parts, and sixteen of a program; with more of a thread, eight parts or a
    softmax would not fit into 128 registers.
    """
    vector = min(_vector(tokens), 4) if mode == _MAX else _vector(tokens)
    lanes = power_of_two(ceil_div(tokens.shape[2], vector), 4, 32)
    rows = _threads(_BACKWARD_WARPS) // lanes
    return {
        "PARTS": part_groups(parts, 8)[1],
        "ROUNDS": _rounds(positions, rows, 2),
        "ROWS": rows,
        "LANES": lanes,
        "VALUES": vector,
        "WHOLE": tokens.shape[2] % (lanes * vector) == 0,
    }


def _check(
    tokens: Tensor,
    masks: Tensor,
    prefix: int,
    mode: int,
    activation: int,
    background: bool,
    eps: float,
) -> tuple[int, int]:
    """Positions and mask channels of a call that can be served."""
    check_available("masked_part_pool", tokens)
    if tokens.dtype not in _DTYPES:
        raise TypeError(
            f"tokens: triton takes float32, float16 and bfloat16, got {tokens.dtype}; "
            'use implementation="reference"'
        )
    if tokens.dim() != 3 or not 0 <= prefix <= tokens.shape[1]:
        raise ValueError(f"tokens: wanted [B, {prefix} + N, C], got {tuple(tokens.shape)}")
    for name, choice, count in (("mode", mode, 3), ("activation", activation, 3)):
        if not 0 <= choice < count:
            raise ValueError(f"{name}: wanted 0 to {count - 1}, got {choice}")
    if not eps > 0.0:
        raise ValueError(f"eps: wanted a positive number, got {eps}")
    batch, positions = tokens.shape[0], tokens.shape[1] - prefix
    if masks.dim() not in (2, 3) or masks.shape[-2] < int(background):
        raise ValueError(
            f"masks: wanted [B, P, N] or [P, N], with a channel of background if so, "
            f"got {tuple(masks.shape)}"
        )
    mask_channels = masks.shape[-2]
    shape = (mask_channels, positions)
    like = torch.empty(0, dtype=torch.float32, device=tokens.device)
    check_like("masks", masks, shape if masks.dim() == 2 else (batch, *shape), like)
    if mask_channels * positions > MAX_SPAN or tokens.shape[2] * _MOST_ROWS > MAX_SPAN:
        raise ValueError(
            f"masked_part_pool: triton takes at most {MAX_SPAN} values of a sample's masks and "
            f"{MAX_SPAN // _MOST_ROWS} channels, "
            f"got {mask_channels} x {positions} and {tokens.shape[2]}"
        )
    return positions, mask_channels


@torch.library.custom_op(
    "gsalign_triton::masked_part_pool",
    mutates_args=(),
    schema="(Tensor tokens, Tensor masks, int prefix, int mode, int activation, bool background,"
    " int visibility, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def masked_part_pool(
    tokens: Tensor,
    masks: Tensor,
    prefix: int,
    mode: int,
    activation: int,
    background: bool,
    visibility: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Forward pass; arguments and results as in ``csrc/register.cpp``.

    Returns:
        Pooled ``[B, P, C]``; visibilities, sums of weights and int32 positions of the largest
        weights (-1 for binary visibilities) ``[B, P]``; int32 positions of the maxima
        ``[B, P, C]``, empty in other modes.
    """
    positions, mask_channels = _check(tokens, masks, prefix, mode, activation, background, eps)
    if visibility not in (0, 1):
        raise ValueError(f"visibility: wanted 0 or 1, got {visibility}")
    tokens, masks = tokens.contiguous(), masks.contiguous()
    batch, _, channels = tokens.shape
    parts = mask_channels - int(background)
    pooled = empty_output(tokens, (batch, parts, channels))
    seen, totals = masks.new_empty(batch, parts), masks.new_empty(batch, parts)
    peaks = torch.empty((batch, parts), dtype=torch.int32, device=tokens.device)
    winners = peaks.new_empty((batch, parts, channels) if mode == _MAX else 0)
    results = (pooled, seen, totals, peaks, winners)
    if positions == 0:
        for result in results:
            result.zero_()
        if visibility == 1:
            peaks.fill_(-1)
    elif batch * parts > 0:
        block = forward_blocks(tokens, positions, parts, mode)
        groups = ceil_div(parts, block["PARTS"])
        tiles = ceil_div(channels, block["BLOCK_C"])
        rows = block["ROUNDS"] * block["ROWS"]
        slots = ceil_div(positions, rows) * rows
        programs = batch * groups * (tiles + 1)
        pairs = ceil_div(block["PARTS"], 2)
        weights = torch.empty(
            (programs, slots, pairs), dtype=torch.int64, device=tokens.device
        )  # each program's own, two float32 in one
        with device_of(tokens):
            _kernels().forward_kernel[checked_grid("masked_part_pool", programs)](
                tokens,
                masks,
                weights,
                *results,
                eps,
                prefix,
                positions,
                channels,
                mask_channels * positions if masks.dim() == 3 else 0,
                slots,
                tiles,
                groups,
                CHANNELS=mask_channels,
                BACKGROUND=int(background),
                MODE=mode,
                ACTIVATION=activation,
                BINARY=visibility == 1,
                GROUP=part_groups(mask_channels, 8)[1],
                SPAN=power_of_two(slots, 16, 32 * _WARPS),
                **block,
                num_warps=_WARPS,
            )
    return (pooled.to(tokens.dtype), *results[1:])


@torch.library.custom_op(
    "gsalign_triton::masked_part_pool_backward",
    mutates_args=(),
    schema="(Tensor grad_pooled, Tensor grad_visibility, Tensor tokens, Tensor masks,"
    " Tensor totals, Tensor peaks, Tensor winners, int prefix, int mode, int activation,"
    " bool background, float eps) -> (Tensor, Tensor)",
)
def masked_part_pool_backward(
    grad_pooled: Tensor,
    grad_visibility: Tensor,
    tokens: Tensor,
    masks: Tensor,
    totals: Tensor,
    peaks: Tensor,
    winners: Tensor,
    prefix: int,
    mode: int,
    activation: int,
    background: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of tokens and masks; the same bits on every run."""
    positions, mask_channels = _check(tokens, masks, prefix, mode, activation, background, eps)
    batch, _, channels = tokens.shape
    parts = mask_channels - int(background)
    check_like("grad_pooled", grad_pooled, (batch, parts, channels), tokens)
    for name, tensor in (("grad_visibility", grad_visibility), ("totals", totals)):
        check_like(name, tensor, (batch, parts), masks)
    where = torch.empty(0, dtype=torch.int32, device=tokens.device)
    check_like("peaks", peaks, (batch, parts), where)
    check_like("winners", winners, (batch, parts, channels) if mode == _MAX else (0,), where)
    grad_pooled, grad_visibility, tokens, masks, totals, peaks, winners = (
        t.contiguous()
        for t in (grad_pooled, grad_visibility, tokens, masks, totals, peaks, winners)
    )
    grad_tokens, grad_masks = empty_output(tokens), torch.empty_like(masks)
    if batch * parts * positions == 0:
        return grad_tokens.zero_().to(tokens.dtype), grad_masks.zero_()
    shared = masks.dim() == 2
    block = backward_blocks(tokens, positions, parts, mode)
    blocks = ceil_div(positions, block["ROUNDS"] * block["ROWS"])
    sloping = mode == _WEIGHTED_MEAN
    finish = not shared and not sloping and parts == block["PARTS"]
    grad_weights = masks.new_empty(0 if finish else (batch, parts, positions))
    slopes = masks.new_empty((batch, blocks, parts) if sloping else 0)
    mask_stride = 0 if shared else mask_channels * positions
    options = {
        "CHANNELS": mask_channels,
        "BACKGROUND": int(background),
        "ACTIVATION": activation,
        "GROUP": part_groups(mask_channels, 8)[1],
    }
    with device_of(tokens):
        _kernels().backward_kernel[checked_grid("masked_part_pool", batch * blocks)](
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
            MODE=mode,
            FINISH=finish,
            **block,
            **options,
            num_warps=_BACKWARD_WARPS,
            maxnreg=_REGISTERS,
        )
        if not finish:
            span = power_of_two(positions, 4, 16 if shared else 64)
            tiles = ceil_div(positions, span)
            sets = 1 if shared else batch
            _kernels().finish_kernel[checked_grid("masked_part_pool", sets * tiles)](
                masks,
                grad_visibility,
                peaks,
                grad_weights,
                slopes,
                grad_masks,
                positions,
                mask_stride,
                blocks if sloping else 0,
                batch // sets,
                tiles,
                BLOCK_S=16 if shared else 1,
                SPAN=span,
                **options,
                num_warps=_WARPS,
            )
    return grad_tokens.to(tokens.dtype), grad_masks
