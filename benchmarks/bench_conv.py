"""The case of the convolution family: the first half of LTPS's angle predictor."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

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
)
from gsalign_kernels import conv_relu_mean
from gsalign_kernels.reference import conv as reference_conv

FAMILY = "conv"
OPERATORS = ("conv_relu_mean",)

SIZE = (16, 8)
PREFIX = 2
CHANNELS = 768
OUTPUTS = 256


def cases(choice: Choice) -> list[Case]:
    """The published layer: the batch of the model's CPU rows, and with ``full`` one of training."""
    batches = [2] if choice.quick else [8, 64] if choice.full else [8]
    dtypes = (torch.float32, torch.bfloat16)
    return [_case(batch, dtype, choice) for dtype in dtypes for batch in batches]


def _case(batch: int, dtype: torch.dtype, choice: Choice) -> Case:
    device = choice.device

    def inputs(device: torch.device) -> Tensors:
        scale = (9 * CHANNELS) ** -0.5
        single = torch.float32
        return {
            "tokens": normal(
                batch, PREFIX + SIZE[0] * SIZE[1], CHANNELS, seed=61, device=device, dtype=dtype
            ),
            "weight": scale * normal(OUTPUTS, CHANNELS, 3, 3, seed=62, device=device, dtype=single),
            "bias": 0.1 * normal(OUTPUTS, seed=63, device=device, dtype=single),
        }

    def call(tensors: Tensors, implementation: str) -> Outputs:
        return (
            conv_relu_mean(
                tensors["tokens"],
                tensors["weight"],
                tensors["bias"],
                size=SIZE,
                prefix=PREFIX,
                implementation=implementation,
            ),
        )

    def plain(tensors: Tensors) -> Outputs:
        return (
            reference_conv.conv_relu_mean(
                tensors["tokens"], tensors["weight"], tensors["bias"], SIZE, PREFIX
            ),
        )

    return Case(
        op="conv_relu_mean",
        shape=f"B{batch} {SIZE[0]}x{SIZE[1]} C{CHANNELS} O{OUTPUTS}",
        dtype=dtype,
        inputs=inputs,
        leaves=("tokens", "weight", "bias"),
        reference=partial(call, implementation="reference"),
        providers=(
            eager(partial(call, implementation="reference")),
            compiled(plain, device, enabled=choice.compile),
            Provider("as images", as_images, note="tokens laid out as [B, C, H, W] first"),
            *implementations("conv_relu_mean", device, call),
        ),
        # Rounding moves a few responses across zero, and half types more of them.
        tolerance=1e-4 if dtype == torch.float32 else 5e-2,
    )


def as_images(tensors: Tensors) -> Outputs:
    """As the published code does: tokens to images, convolution, ReLU, mean."""
    tokens: Tensor = tensors["tokens"]
    image = tokens[:, PREFIX:].transpose(1, 2).reshape(tokens.shape[0], -1, *SIZE).contiguous()
    weight, bias = (tensors[name].to(tokens.dtype) for name in ("weight", "bias"))
    response = functional.conv2d(image, weight, bias, padding=1).relu()
    wide = torch.promote_types(tokens.dtype, torch.float32)
    return (response.mean(dim=(2, 3), dtype=wide),)
