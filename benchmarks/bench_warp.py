"""Cases of the warp family: token maps of the published model, images beside kornia."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.case import (
    PASSES,
    Case,
    Choice,
    Outputs,
    Provider,
    Tensors,
    compiled,
    control_lattice,
    eager,
    implementations,
    jittered_lattice,
    normal,
    uniform,
)
from gsalign_kernels import tps_basis, warp_image, warp_tokens
from gsalign_kernels.reference import tps as reference_tps
from gsalign_kernels.reference import warp as reference_warp

FAMILY = "warp"
OPERATORS = ("warp_tokens", "warp_image")

MAP = (16, 8)
CHANNELS = 768
ETA = 0.1
IMAGE = (256, 128)


def cases(choice: Choice) -> list[Case]:
    """Token warps at batch 128 and 8 in two types, image warps at three numbers of points."""
    found = []
    batches = (8, 2) if choice.quick else (128, 8)
    for batch in batches:
        for dtype in (torch.float32, torch.bfloat16):
            found.append(_tokens(choice, batch, dtype, compile=batch == batches[0]))
    for side in (4, 5, 10):
        found.append(_image(choice, 2 if choice.quick else 32, side, compile=side == 5))
    return found


def _tokens(choice: Choice, batch: int, dtype: torch.dtype, *, compile: bool) -> Case:
    height, width = MAP
    device = choice.device

    def inputs(device: torch.device) -> Tensors:
        lattice = control_lattice(2)
        moves = normal(4, 2, seed=2, device=lattice.device, dtype=lattice.dtype)
        return {
            "tokens": normal(batch, height * width, CHANNELS, seed=1, device=device, dtype=dtype),
            "source": (lattice + 0.2 * moves).to(device),
            "angle": 0.3 * normal(batch, seed=3, device=device, dtype=torch.float32),
            "basis": tps_basis(lattice, MAP, implementation="reference").to(device),
        }

    def call(tensors: Tensors, implementation: str) -> Outputs:
        warped = warp_tokens(
            tensors["tokens"],
            tensors["source"],
            tensors["angle"],
            tensors["basis"],
            size=MAP,
            eta=ETA,
            implementation=implementation,
        )
        return (warped,)

    def plain(tensors: Tensors) -> Outputs:
        t = tensors
        return (
            reference_warp.warp_tokens(
                t["tokens"], t["source"], t["angle"], t["basis"], MAP, ETA, 0
            ),
        )

    enabled = choice.compile and compile
    return Case(
        op="warp_tokens",
        shape=f"B{batch} {height}x{width} C{CHANNELS} K4",
        dtype=dtype,
        inputs=inputs,
        leaves=("tokens", "source", "angle"),
        reference=partial(call, implementation="reference"),
        providers=(
            eager(partial(call, implementation="reference")),
            compiled(plain, device, enabled=enabled),
            compiled(
                gathered_tokens,
                device,
                enabled=enabled,
                name="torch.compile of a gather",
                note="channels-last gather written for the compiler, no grid_sample",
            ),
            *implementations("warp_tokens", device, call),
        ),
        # The gradients of grid_sample jump where a position crosses a pixel, so that a rounding
        # error of a position weighs more there.
        tolerance=2e-4 if dtype == torch.float32 else None,
        passes=PASSES,
    )


def gathered_tokens(tensors: Tensors) -> Outputs:
    """The token warp as four gathers of whole tokens: what a compiler can fuse best."""
    tokens = tensors["tokens"]
    height, width = MAP
    exact = reference_tps.computation_dtype(tokens)
    grid = reference_warp.rotated_grid(
        tensors["source"].to(exact), tensors["angle"].to(exact), tensors["basis"].to(exact)
    )
    x = ((grid[..., 0] + 1) * (0.5 * (width - 1))).clamp(0, width - 1)
    y = ((grid[..., 1] + 1) * (0.5 * (height - 1))).clamp(0, height - 1)
    left, top = x.detach().floor(), y.detach().floor()
    fx, fy = (x - left).unsqueeze(-1), (y - top).unsqueeze(-1)
    left, top = left.long(), top.long()
    right, bottom = (left + 1).clamp(max=width - 1), (top + 1).clamp(max=height - 1)
    batch = torch.arange(tokens.shape[0], device=tokens.device).unsqueeze(1)

    def at(row: Tensor, column: Tensor) -> Tensor:
        return tokens[batch, row * width + column].to(exact)

    upper = at(top, left) * (1 - fx) + at(top, right) * fx
    lower = at(bottom, left) * (1 - fx) + at(bottom, right) * fx
    warped = tokens.to(exact) + ETA * (upper * (1 - fy) + lower * fy)
    return (warped.to(tokens.dtype),)


def _image(choice: Choice, batch: int, side: int, *, compile: bool) -> Case:
    height, width = IMAGE
    count = side * side
    device = choice.device

    def inputs(device: torch.device) -> Tensors:
        points = jittered_lattice(batch, count, seed=4, device=device, jitter=0.0)
        moves = uniform(batch, count, 2, seed=5, device=device) * 2.0 - 1.0
        return {
            "image": normal(batch, 3, *IMAGE, seed=6, device=device, dtype=torch.float32),
            "points": points,
            "values": points + 0.25 * 2.0 / (side - 1) * moves,
        }

    def call(tensors: Tensors, implementation: str) -> Outputs:
        warped = warp_image(
            tensors["image"], tensors["points"], tensors["values"], implementation=implementation
        )
        return (warped,)

    def plain(tensors: Tensors) -> Outputs:
        image, points, values = tensors["image"], tensors["points"], tensors["values"]
        coefficients = reference_tps.tps_solve(points, values, 0.0)[0]
        return (
            reference_warp.warp_image(
                image, coefficients, points, IMAGE, "bilinear", "zeros", True
            ),
        )

    return Case(
        op="warp_image",
        shape=f"B{batch} 3x{height}x{width} K{count}",
        dtype=torch.float32,
        inputs=inputs,
        leaves=("image", "values"),
        reference=partial(call, implementation="reference"),
        providers=(
            eager(partial(call, implementation="reference")),
            compiled(plain, device, enabled=choice.compile and compile),
            Provider(
                "kornia",
                kornia_image,
                unavailable=None if find_spec("kornia") else "kornia is not installed",
                # a^2 + b^2 - 2ab for squared distances cancels: 2 % of a gradient at K 100.
                slack=4.0,
                note="our coefficients (torch.linalg.solve), kornia's warp_image_tps",
            ),
            *implementations("warp_image", device, call),
        ),
        # White noise has the steepest slopes, and they jump from pixel to pixel: the reference
        # itself, in float32, is 0.7 % off in the gradient of the values at K 25.
        tolerance=2e-2,
        passes=PASSES,
    )


def kornia_image(tensors: Tensors) -> Outputs:
    """Kornia's warp with the classical spline's coefficients.

    kornia's own get_tps_transform solves another system, whose result could not be checked.
    """
    from kornia.geometry.transform import warp_image_tps

    points = tensors["points"]
    coefficients = reference_tps.tps_solve(points, tensors["values"], 0.0)[0]
    count = points.shape[1]
    warped = warp_image_tps(
        tensors["image"],
        points,
        coefficients[:, :count],
        coefficients[:, count:],
        align_corners=True,
    )
    return (warped,)
