"""Cases of the pool family: token maps under 1, 6 and 8 masks, beside torch.bmm."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.case import (
    Case,
    Choice,
    Outputs,
    Provider,
    Tensors,
    compiled,
    eager,
    implementations,
    normal,
    uniform,
)
from gsalign_kernels import masked_part_pool
from gsalign_kernels.reference import pool as reference_pool

FAMILY = "pool"
OPERATORS = ("masked_part_pool",)

POSITIONS = 128
CHANNELS = 768
EPS = 1e-6


def cases(choice: Choice) -> list[Case]:
    """Batch 64, three numbers of parts, two types."""
    batch = 4 if choice.quick else 64
    return [
        _pool(choice, batch, parts, dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for parts in (1, 6, 8)
    ]


def _pool(choice: Choice, batch: int, parts: int, dtype: torch.dtype) -> Case:
    device = choice.device

    def inputs(device: torch.device) -> Tensors:
        return {
            "tokens": normal(batch, POSITIONS, CHANNELS, seed=31, device=device, dtype=dtype),
            "masks": uniform(batch, parts, POSITIONS, seed=32, device=device),
        }

    def call(tensors: Tensors, implementation: str) -> Outputs:
        return masked_part_pool(tensors["tokens"], tensors["masks"], implementation=implementation)

    def plain(tensors: Tensors) -> Outputs:
        return reference_pool.masked_part_pool(
            tensors["tokens"], tensors["masks"], 0, "weighted_mean", None, False, "continuous", EPS
        )

    half = dtype != torch.float32
    return Case(
        op="masked_part_pool",
        shape=f"B{batch} N{POSITIONS} C{CHANNELS} P{parts}",
        dtype=dtype,
        inputs=inputs,
        leaves=("tokens", "masks"),
        reference=partial(call, implementation="reference"),
        providers=(
            eager(partial(call, implementation="reference")),
            compiled(plain, device, enabled=choice.compile and parts == 6),
            Provider(
                "torch.bmm",
                bmm_pool,
                slack=4.0 if half else 1.0,
                note="masks rounded to the tokens' type before the product" if half else "",
            ),
            *implementations("masked_part_pool", device, call),
        ),
    )


def bmm_pool(tensors: Tensors) -> Outputs:
    """The weighted mean as a library product in the tokens' own type."""
    tokens, masks = tensors["tokens"], tensors["masks"]
    pooled = torch.bmm(masks.to(tokens.dtype), tokens)
    totals = masks.sum(dim=-1, keepdim=True).clamp(min=EPS)
    return (pooled / totals).to(tokens.dtype), masks.max(dim=-1).values
