"""The CUDA kernels of thin-plate splines, run with host threads, plain and under the sanitizers."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from host_driver import (
    BUILDS,
    Reader,
    Run,
    assert_clean,
    compile_drivers,
    needs_compiler,
    relative_error,
    run,
    run_builds,
    run_faulty,
)

from gsalign_kernels.reference import tps as reference

DTYPES = (torch.float32, torch.float64)
SOLVE, SOLVE_BACKWARD, FORWARD, GRADIENT, POINTS_BACKWARD = 1, 2, 4, 8, 16
EVERYTHING, SOLVES, EVALUATIONS = 31, 3, 28
# Relative error of a whole tensor against float64. The solve computes in float64, so what is left
# of float32 is one rounding; its adjoint starts from rounded coefficients, which the system's
# condition magnifies.
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-13}
SOLVED = {torch.float32: 1e-7, torch.float64: 1e-11}
ADJOINT = {torch.float32: 2e-5, torch.float64: 1e-10}

pytestmark = needs_compiler


@dataclass(frozen=True)
class Case:
    """One problem, and the chip that the plans are made for. Threads and tile of 0: as planned."""

    name: str
    dtype: torch.dtype = torch.float64
    batch: int = 2
    points: int = 5
    columns: int = 2
    count: int = 7
    height: int = 3
    width: int = 4
    align_corners: bool = True
    regularization: float = 0.0
    passes: int = EVERYTHING
    solve_threads: int = 32
    threads: int = 64
    tile: int = 0
    multiprocessors: int = 1
    shared_per_block: int = 200 * 1024
    repeats: int = 1
    control_points: str = "spread"
    large: bool = False  # too slow under the sanitizers

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """In float64, rounded to the type, in the order of the driver's file."""
        generator = torch.Generator().manual_seed(len(self.name) + 31 * self.points)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64).to(self.dtype)

        side = math.ceil(math.sqrt(self.points))
        axis = torch.linspace(-1, 1, side, dtype=torch.float64)
        lattice = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
        jitter = normal(self.batch, self.points, 2).clamp(-1, 1) * (0.25 / side)
        control_points = (lattice[: self.points] + jitter).to(self.dtype)
        if self.batch > 1:  # one bad sample beside good ones
            if self.control_points == "repeated":
                control_points[1, -1] = control_points[1, 0]
            elif self.control_points == "collinear":
                control_points[1, :, 1] = 2 * control_points[1, :, 0]
            elif self.control_points == "not a number":
                control_points[1, -1, 1] = float("nan")
            elif self.control_points == "infinite":
                control_points[1, 0, 0] = float("-inf")
        order = (self.batch, self.points + 3, self.columns)
        points = normal(self.batch, self.count, 2)
        if self.count > 0 and self.batch > 0:
            points[0, 0] = control_points[0, 0]  # the distance is zero
        return tuple(
            tensor.double()
            for tensor in (
                control_points,
                normal(self.batch, self.points, self.columns),
                normal(*order),
                normal(*order),
                points,
                normal(self.batch, self.count, self.columns),
                normal(self.batch, self.height, self.width, self.columns),
            )
        )


CASES = (
    Case("three points", points=3, repeats=2),
    Case("four points", points=4, count=130, dtype=torch.float32, repeats=2),
    Case("five points, no column", columns=0),
    Case("one column", columns=1, points=4),
    Case("columns in two groups", solve_threads=64, columns=11, points=6, count=3, repeats=2),
    Case("as many columns as points", columns=16, points=16, dtype=torch.float32, passes=SOLVES),
    Case("columns over blocks", columns=20, points=5, batch=1, multiprocessors=8),
    Case("some over blocks", columns=20, points=4, multiprocessors=4, passes=SOLVES),
    Case("sixteen points as planned", points=16, solve_threads=0, dtype=torch.float32),
    Case("thirty-three points", points=33, columns=5, passes=SOLVES, repeats=2),
    Case("seventy points over a narrow block", points=70, threads=32, passes=EVALUATIONS),
    Case("regularised", points=9, regularization=0.05, align_corners=False),
    Case("repeated but regularised", regularization=0.05, control_points="repeated"),
    Case("in place", points=12, solve_threads=64, columns=5, shared_per_block=2000, repeats=2),
    Case("two tiles", count=300, points=4, tile=160, dtype=torch.float32, repeats=2),
    Case("many tiles", count=600, points=3, tile=32, batch=1),
    Case("tile for a small batch", count=1000, points=3, batch=1, passes=GRADIENT),
    Case("one pixel", height=1, width=1, count=1, align_corners=False),
    Case("one row", height=1, width=9),
    Case("one column of pixels", height=9, width=1, align_corners=False),
    Case("empty batch", batch=0),
    Case("no points", count=0, repeats=2),
    *(
        Case(f"{kind}, {count}", dtype=dtype, points=count, control_points=kind, passes=SOLVES)
        for kind in ("repeated", "collinear", "not a number", "infinite")
        for count, dtype in ((3, torch.float32), (9, torch.float64))
    ),
    *(
        Case(f"{kind}, large", points=100, control_points=kind, passes=SOLVE, large=True)
        for kind in ("repeated", "collinear")
    ),
    Case("a hundred points", points=100, batch=1, passes=SOLVES, large=True),
    Case("a hundred in float", torch.float32, points=100, batch=1, passes=SOLVES, large=True),
    Case("a hundred, every column", points=100, columns=100, batch=1, passes=SOLVE,
         large=True),
    Case("as planned", points=128, batch=1, solve_threads=0, passes=SOLVES, large=True),
    Case("many in place", points=128, batch=1, passes=SOLVES, shared_per_block=60000, large=True),
    Case("chunks of control points", points=300, batch=1, passes=EVALUATIONS, count=40,
         large=True),
    Case("long sums in float", torch.float32, points=130, batch=1, passes=EVALUATIONS, count=1500,
         threads=256, columns=3, large=True),
)  # fmt: skip
# Sanitizers, and host threads under them, are slow.
BY_BUILD = {
    "plain": CASES,
    "address": tuple(case for case in CASES if not case.large),
    "thread": tuple(case for case in CASES if case.points <= 12),
}
NAMES = (
    *("coefficients", "info", "solve_d_control_points", "solve_d_values"),
    *("values", "d_coefficients", "d_control_points", "d_points"),
    *("map", "map_d_coefficients", "map_d_control_points"),
)


def write_cases(path: Path, cases: tuple[Case, ...]) -> None:
    with open(path, "wb") as file:
        for case in cases:
            header = (
                *(DTYPES.index(case.dtype), case.batch, case.points, case.columns, case.count),
                *(case.height, case.width, case.align_corners, case.passes, case.solve_threads),
                *(case.threads, case.tile, case.multiprocessors, case.shared_per_block),
                case.repeats,
            )
            file.write(struct.pack("<15i", *header))
            file.write(struct.pack("<d", case.regularization))
            for tensor in case.tensors():
                file.write(tensor.contiguous().numpy().tobytes())


@dataclass(frozen=True)
class Result:
    """What the driver wrote for one case: tensors by name, and (staged, threads, columns, splits,
    bytes of shared memory) of both solves."""

    plan: tuple[int, ...]
    adjoint_plan: tuple[int, ...]
    tile: int
    tensors: dict[str, torch.Tensor]


def read_results(path: Path, cases: tuple[Case, ...]) -> dict[str, Result]:
    read, results = Reader(path), {}
    for case in cases:
        told = read.integers(11)
        tensors = {}
        batch, rows = case.batch, case.points + 3
        of_points = (batch, case.points, 2)
        shapes = (
            *((batch, rows, case.columns), (batch,), of_points, (batch, case.points, case.columns)),
            *((batch, case.count, case.columns), (batch, rows, case.columns), of_points),
            *((batch, case.count, 2), (batch, case.height, case.width, case.columns)),
            *((batch, rows, case.columns), of_points),
        )
        for name, shape in zip(NAMES, shapes, strict=True):
            tensors[name] = read.tensor(shape, np.float64)
        results[case.name] = Result(told[:5], told[5:10], told[10], tensors)
    read.finish()
    return results


def expected(case: Case) -> dict[str, torch.Tensor]:
    """What was asked for, by the reference in float64; NaN for samples without a solution."""
    control, values, by_coefficients, coefficients, points, by_values, by_map = case.tensors()
    wanted = {}
    if case.passes & SOLVE:
        leaves = (control.clone().requires_grad_(), values.clone().requires_grad_())
        solved, info = reference.tps_solve(*leaves, case.regularization)
        wanted["coefficients"], wanted["info"] = solved.detach(), info.double()
        good = info == 0
        if case.passes & SOLVE_BACKWARD:
            gradients = torch.autograd.grad(solved[good], leaves, by_coefficients[good])
            for name, gradient in zip(NAMES[2:4], gradients, strict=True):
                gradient[~good] = float("nan")
                wanted[name] = gradient
    leaves = tuple(t.clone().requires_grad_() for t in (coefficients, control, points))
    there = reference.tps_evaluate(*leaves)
    dense = reference.tps_grid(*leaves[:2], (case.height, case.width), case.align_corners)
    if case.passes & FORWARD:
        wanted["values"], wanted["map"] = there.detach(), dense.detach()
    gradients = torch.autograd.grad(there, leaves, by_values)
    if case.passes & GRADIENT:
        wanted["d_coefficients"], wanted["d_control_points"] = gradients[:2]
        of_map = torch.autograd.grad(dense, leaves[:2], by_map)
        wanted["map_d_coefficients"], wanted["map_d_control_points"] = of_map
    if case.passes & POINTS_BACKWARD:
        wanted["d_points"] = gradients[2]
    return wanted


@pytest.fixture(scope="session")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return compile_drivers("tps_driver.cpp", tmp_path_factory.mktemp("drivers"))


@pytest.fixture(scope="session")
def runs(drivers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    writers = {build: partial(write_cases, cases=cases) for build, cases in BY_BUILD.items()}
    return run_builds(drivers, tmp_path_factory.mktemp("runs"), writers)


@pytest.fixture(scope="session")
def results(runs: dict[str, Run]) -> dict[str, Result]:
    done = runs["plain"].done
    assert done.returncode == 0, done.stderr
    return read_results(runs["plain"].results, CASES)


@pytest.mark.parametrize("build", BUILDS)
def test_runs_clean_and_twice_the_same(build: str, runs: dict[str, Run]) -> None:
    assert_clean(runs[build])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_agree_with_the_reference(case: Case, results: dict[str, Result]) -> None:
    actual, wanted = results[case.name].tensors, expected(case)
    if "info" in wanted:
        assert torch.equal(actual["info"], wanted["info"])
    for name, right in wanted.items():
        got = actual[name]
        assert torch.equal(got.isnan(), right.isnan()), name  # also: nothing was left poisoned
        tolerance = TOLERANCE
        if name == "coefficients":
            tolerance = SOLVED
        elif name.startswith("solve_d"):
            tolerance = ADJOINT
        assert relative_error(got.nan_to_num(), right.nan_to_num()) <= tolerance[case.dtype], name


def test_cases_reach_every_path(results: dict[str, Result]) -> None:
    solves = {case.name: results[case.name] for case in CASES if case.passes & SOLVE}
    plans = {name: result.plan for name, result in solves.items()}
    adjoint_plans = {name: result.adjoint_plan for name, result in solves.items()}
    in_place = {"in place", "many in place"}
    assert {name for name, plan in plans.items() if not plan[0]} == in_place
    assert {name for name, plan in adjoint_plans.items() if not plan[0]} == in_place
    assert plans["columns over blocks"][3] == adjoint_plans["columns over blocks"][3] == 3
    assert plans["some over blocks"][3] == 2
    assert plans["a hundred, every column"][3] == 1  # of a chip of one multiprocessor
    assert plans["sixteen points as planned"][1] == 32
    assert plans["as planned"][1] == 256
    assert results["tile for a small batch"].tile == 512
    infos = torch.cat([results[case.name].tensors["info"] for case in CASES if case.passes & SOLVE])
    assert set(infos.tolist()) == {0.0, 1.0, 2.0}


# One fault at a time: a case, which of its launches, and the barriers of one of its blocks. With
# eleven columns the second group overwrites what the first read; every sample is another chance for
# the sanitizer to see a race.
SMALL = Case("small", solve_threads=64, points=6, columns=11, count=70, batch=3, height=1, width=1)
CHUNKS = replace(SMALL, points=300, columns=1)
FAULTY = {
    "solve": (replace(SMALL, passes=SOLVE), 0, range(30)),
    "solve backward": (replace(SMALL, passes=SOLVES), 1, range(14)),
    "evaluate": (replace(CHUNKS, passes=FORWARD), 0, range(3)),
    "points backward": (replace(CHUNKS, passes=POINTS_BACKWARD), 0, range(3)),
    "gradient": (replace(SMALL, points=32, passes=GRADIENT), 0, range(8)),
    "sum": (replace(SMALL, tile=32, passes=GRADIENT), 1, range(1)),
}


@pytest.mark.parametrize(
    ("kernel", "barrier"),
    [(kernel, barrier) for kernel, (_, _, barriers) in FAULTY.items() for barrier in barriers],
)
def test_thread_sanitizer_finds_a_missing_barrier(
    kernel: str, barrier: int, drivers: dict[str, Path], tmp_path: Path
) -> None:
    case, launch, _ = FAULTY[kernel]
    options = ("--skip-barrier", str(barrier), "--launch", str(launch))
    done = run_faulty(
        drivers["thread"], tmp_path, partial(write_cases, cases=(case,)), *options
    ).done
    assert done.returncode != 0
    assert "ThreadSanitizer" in done.stderr  # a data race, or what came of reading poison


@pytest.mark.parametrize("kernel", FAULTY)
def test_address_sanitizer_finds_a_step_past_shared_memory(
    kernel: str, drivers: dict[str, Path], tmp_path: Path
) -> None:
    case, launch, _ = FAULTY[kernel]
    options = ("--missing-shared", "8", "--launch", str(launch))
    done = run(drivers["address"], tmp_path, partial(write_cases, cases=(case,)), *options).done
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr
