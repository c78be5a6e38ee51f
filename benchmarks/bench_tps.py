"""Cases of the tps family: batched solves beside torch.linalg.solve, and the dense grid."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.case import (
    Case,
    Choice,
    Outputs,
    Tensors,
    compiled,
    eager,
    implementations,
    jittered_lattice,
    uniform,
)
from gsalign_kernels import tps_grid, tps_solve
from gsalign_kernels.reference import tps as reference_tps

FAMILY = "tps"
OPERATORS = ("tps_solve", "tps_grid")

ORDERS = (7, 12, 28, 39, 103)
GRID = (256, 128)


def cases(choice: Choice) -> list[Case]:
    """Solves of five orders at batch 1024, and a grid at two numbers of control points."""
    found = [_solve(choice, 16 if choice.quick else 1024, order) for order in ORDERS]
    found += [_grid(choice, 2 if choice.quick else 8, count) for count in (25, 100)]
    return found


def _solve(choice: Choice, batch: int, order: int) -> Case:
    count = order - 3
    device = choice.device

    def inputs(device: torch.device) -> Tensors:
        points = jittered_lattice(batch, count, seed=21, device=device)
        moves = uniform(batch, count, 2, seed=22, device=device) - 0.5
        return {"points": points, "values": points + 0.2 * moves}

    def call(tensors: Tensors, implementation: str) -> Outputs:
        return (tps_solve(tensors["points"], tensors["values"], implementation=implementation),)

    return Case(
        op="tps_solve",
        shape=f"B{batch} n{order}",
        dtype=torch.float32,
        inputs=inputs,
        leaves=("points", "values"),
        reference=partial(call, implementation="reference"),
        providers=(
            eager(partial(call, implementation="reference"), note="torch.linalg.solve"),
            *implementations("tps_solve", device, call),
        ),
        # The condition of the system times the rounding of float32.
        tolerance=5e-3,
    )


def _grid(choice: Choice, batch: int, count: int) -> Case:
    height, width = GRID
    device = choice.device

    def inputs(device: torch.device) -> Tensors:
        points = jittered_lattice(batch, count, seed=23, device=device)
        moves = uniform(batch, count, 2, seed=24, device=device) - 0.5
        values = points + 0.2 * moves
        exact = reference_tps.tps_solve(points.double(), values.double(), 0.0)[0]
        return {"coefficients": exact.float(), "points": points}

    def call(tensors: Tensors, implementation: str) -> Outputs:
        grid = tps_grid(
            tensors["coefficients"], tensors["points"], GRID, implementation=implementation
        )
        return (grid,)

    def plain(tensors: Tensors) -> Outputs:
        return (reference_tps.tps_grid(tensors["coefficients"], tensors["points"], GRID, True),)

    return Case(
        op="tps_grid",
        shape=f"B{batch} {height}x{width} K{count}",
        dtype=torch.float32,
        inputs=inputs,
        leaves=("coefficients", "points"),
        reference=partial(call, implementation="reference"),
        providers=(
            eager(partial(call, implementation="reference")),
            compiled(plain, device, enabled=choice.compile and count == 25),
            *implementations("tps_grid", device, call),
        ),
        # Weights of both signs cancel in the sums over pixels.
        tolerance=1e-3,
    )
