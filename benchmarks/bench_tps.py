"""Cases of the tps family: batched solves beside torch.linalg.solve, and the dense grid."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.case import (
    FORWARD,
    Case,
    Choice,
    Outputs,
    Provider,
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
    """Solves of five orders at three batches, and a grid at two numbers of control points."""
    batches = (16,) if choice.quick else (1024, 128, 1)
    found = [_solve(choice, batch, order) for batch in batches for order in ORDERS]
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
            eager(partial(call, implementation="reference"), note="in float64, with the check"),
            Provider(
                "torch.linalg.solve",
                _library_solve,
                # One figure in 10,000 of the worst system is lost to float32.
                slack=4.0,
                note="float32, the matrix assembled in eager PyTorch",
            ),
            Provider(
                "torch.linalg.solve of a matrix",
                _library_solve_ready,
                slack=4.0,
                note="float32, the matrix given: the library's solver alone",
                passes=(FORWARD,),
            ),
            *implementations("tps_solve", device, call),
        ),
        # The condition of the system times the rounding of float32.
        tolerance=5e-3,
    )


def _system(tensors: Tensors) -> tuple[Tensor, Tensor]:
    values = tensors["values"]
    right = torch.cat([values, values.new_zeros(values.shape[0], 3, 2)], dim=1)
    return reference_tps.system_matrix(tensors["points"], 0.0), right


def _library_solve(tensors: Tensors) -> Outputs:
    return (torch.linalg.solve(*_system(tensors)),)


def _library_solve_ready(tensors: Tensors) -> Outputs:
    if "matrix" not in tensors:  # at the first call, which is not timed
        tensors["matrix"], tensors["right"] = _system(tensors)
    return (torch.linalg.solve(tensors["matrix"], tensors["right"]),)


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
