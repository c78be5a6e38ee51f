"""The CUDA kernels of the token warp, run with host threads, plain and under the sanitizers."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

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

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Relative error of a whole tensor; half types are computed in float32 and rounded once.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}

pytestmark = needs_compiler


@dataclass(frozen=True)
class Case:
    """One launch of the kernels: a problem, and the chip that the plan is made for."""

    name: str
    dtype: torch.dtype = torch.float32
    batch: int = 2
    height: int = 3
    width: int = 4
    prefix: int = 1
    channels: int = 8
    points: int = 4
    threads: int = 64
    vectors: bool = True
    shared_per_block: int = 200 * 1024
    shared_per_multiprocessor: int = 228 * 1024
    multiprocessors: int = 4
    passes: int = 3
    repeats: int = 1
    coordinates: str = "random"

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Tokens and gradient (rounded to the type), source points, angles, basis, all float32."""
        generator = torch.Generator().manual_seed(len(self.name) + 31 * self.channels)
        queries = self.height * self.width
        shape = (self.batch, self.prefix + queries, self.channels)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator)

        tokens, grad = (normal(*shape).to(self.dtype).float() for _ in range(2))
        points, angle = 0.6 * normal(self.points, 2), normal(self.batch)
        basis = normal(queries, self.points) / self.points**0.5
        if self.coordinates == "corner":  # every query is clamped into the last cell
            points, angle = torch.full_like(points, 3.0), torch.zeros_like(angle)
            basis = basis.abs() + 1.0
        elif self.coordinates == "identity":
            points, angle = torch.eye(2).repeat(self.points, 1)[: self.points], angle * 0
            ys, xs = (torch.linspace(-1, 1, n) for n in (self.height, self.width))
            basis = basis * 0
            basis[:, 0] = xs.repeat(self.height)
            basis[:, 1] = ys.repeat_interleave(self.width)
        elif self.coordinates == "wild":
            angle[0] = float("nan")
            basis[::3] *= 1e30
            basis[1] = float("inf")
            basis[2] = float("-inf")
            basis[4, 0] = float("nan")
        return tokens, grad, points, angle, basis


CASES = (
    Case("scalar lanes", channels=7, height=3, width=5, repeats=2),
    Case(
        "float32 staged",
        channels=96,
        points=3,
        repeats=2,
        batch=1,
        multiprocessors=1,
        shared_per_multiprocessor=1024,
    ),
    Case("float16 staged, part of a tile", torch.float16, channels=48, prefix=2, repeats=2),
    Case("bfloat16 staged, several tiles", torch.bfloat16, channels=136, prefix=0, repeats=2),
    Case("bfloat16 in place", torch.bfloat16, channels=72, shared_per_block=2800, height=5),
    Case("float32 in place", channels=40, prefix=3, shared_per_block=2800, height=6),
    Case("half scalar lanes", torch.float16, channels=33),
    Case("one channel", torch.bfloat16, channels=1),
    Case("no vectors by alignment", channels=16, vectors=False),
    Case("one row", height=1, width=9),
    Case("one column", torch.float16, height=9, width=1),
    Case("one token", height=1, width=1, prefix=0),
    Case("identity", coordinates="identity", height=4, width=5),
    Case("corner", torch.bfloat16, coordinates="corner", height=6, width=6, channels=16),
    Case("corner in place", coordinates="corner", height=6, width=6, channels=5),
    Case("wild", coordinates="wild", height=5, width=4, batch=3),
    Case("wild row", coordinates="wild", height=1, width=7, batch=3),
    Case("many queries, small blocks", height=20, width=15, threads=32, channels=4, batch=1),
    Case("many queries in place", height=20, width=15, channels=3, batch=1),
    Case("tables in device memory", torch.float16, channels=24, shared_per_block=2000, height=9),
    Case("base made before", points=20, channels=12),
    Case("more points than threads", points=40, channels=4, threads=32),
    Case("rows of 64 bytes", channels=64, height=10, width=10, shared_per_block=22 * 1024, batch=1),
    Case("next tile comes ahead", channels=160, batch=4, multiprocessors=1, repeats=2),
    Case("empty batch", batch=0),
)


def expected(case: Case) -> tuple[torch.Tensor, ...]:
    """Output and gradients in float64, by grid_sample and autograd.

    grid_sample reads out of bounds in its backward pass where a coordinate is NaN, so those are
    set to where its forward pass reads: the first row or column.
    """
    tokens, grad, points, angle, basis = (t.double() for t in case.tensors())
    tokens, points, angle = (t.requires_grad_() for t in (tokens, points, angle))
    cosine, sine = angle.cos(), angle.sin()
    base = basis @ points
    x = base[:, 0] * cosine[:, None] - base[:, 1] * sine[:, None]
    y = base[:, 0] * sine[:, None] + base[:, 1] * cosine[:, None]
    grid = torch.stack([x, y], -1).nan_to_num(nan=-1.0).clamp(-2, 2)
    if case.batch == 0:
        return tuple(torch.zeros_like(t) for t in (tokens, tokens, points, angle))
    size = (case.height, case.width)
    image = tokens[:, case.prefix :].transpose(1, 2).unflatten(2, size)
    sampled = torch.nn.functional.grid_sample(
        image, grid.unflatten(1, size), padding_mode="border", align_corners=True
    )
    warped = tokens[:, case.prefix :] + 0.25 * sampled.flatten(2).transpose(1, 2)
    output = torch.cat([tokens[:, : case.prefix], warped], 1)
    grads = torch.autograd.grad(output, (tokens, points, angle), grad)
    return (output.detach(), *grads)


def write_cases(path: Path, cases: tuple[Case, ...]) -> None:
    with open(path, "wb") as file:
        for case in cases:
            header = (
                DTYPES.index(case.dtype),
                *(case.batch, case.height, case.width, case.prefix, case.channels, case.points),
                *(case.threads, case.vectors, case.shared_per_block),
                *(case.shared_per_multiprocessor, case.multiprocessors, case.passes, case.repeats),
            )
            file.write(struct.pack("<14i", *header))
            file.write(struct.pack("<f", 0.25))
            for tensor in case.tensors():
                file.write(tensor.contiguous().numpy().tobytes())


@dataclass(frozen=True)
class Result:
    """What the driver wrote for one case.

    Plans are (vectors, buffers, lane bits, groups, bytes of shared memory, bytes of tables per
    block in device memory).
    """

    forward_plan: tuple[int, ...]
    backward_plan: tuple[int, ...]
    tensors: tuple[torch.Tensor, ...]


def read_results(path: Path, cases: tuple[Case, ...]) -> dict[str, Result]:
    read, results = Reader(path), {}
    for case in cases:
        plans = read.integers(12)
        tensors = []
        tokens = (case.batch, case.prefix + case.height * case.width, case.channels)
        for shape in (tokens, tokens, (case.points, 2), (case.batch,)):
            tensors.append(read.tensor(shape))
        results[case.name] = Result(plans[:6], plans[6:], tuple(tensors))
    read.finish()
    return results


@pytest.fixture(scope="session")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return compile_drivers("warp_driver.cpp", tmp_path_factory.mktemp("drivers"))


@pytest.fixture(scope="session")
def runs(drivers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Every case under every build."""
    writers = dict.fromkeys(BUILDS, lambda path: write_cases(path, CASES))
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
def test_kernels_match_grid_sample(case: Case, results: dict[str, Result]) -> None:
    wanted = expected(case)
    names = ("output", "grad_tokens", "grad_source_points", "grad_angle")
    for index, (name, actual) in enumerate(zip(names, results[case.name].tensors, strict=True)):
        # Gradients of points and angles are float32 sums over the whole batch.
        tolerance = TOLERANCE[case.dtype] if index < 2 else 2e-5
        if case.coordinates == "wild" and index >= 2:
            # A NaN angle or an infinite base makes them NaN, as it does in autograd.
            assert torch.equal(actual.isnan(), wanted[index].isnan()), name
            continue
        assert bool(actual.isfinite().all()), name  # also: nothing was left poisoned
        assert relative_error(actual, wanted[index]) <= tolerance, name


def test_prefix_is_copied_to_the_bit(results: dict[str, Result]) -> None:
    for case in CASES:
        tokens, grad = case.tensors()[:2]
        output, grad_tokens = results[case.name].tensors[:2]
        assert torch.equal(output[:, : case.prefix], tokens[:, : case.prefix])
        assert torch.equal(grad_tokens[:, : case.prefix], grad[:, : case.prefix])


def test_identity_adds_eta_times_the_token(results: dict[str, Result]) -> None:
    case = next(case for case in CASES if case.name == "identity")
    tokens, (output, *_) = case.tensors()[0], results[case.name].tensors
    assert relative_error(output[:, 1:], 1.25 * tokens[:, 1:].double()) < 1e-6


def test_cases_reach_every_path(results: dict[str, Result]) -> None:
    plans = {name: result.backward_plan for name, result in results.items()}
    forward = {name: result.forward_plan for name, result in results.items()}
    assert {plan[:2] for plan in plans.values()} == {(0, 0), (1, 0), (1, 1)}
    assert {plan[:2] for plan in forward.values()} == {(0, 0), (1, 0), (1, 1), (1, 2)}
    assert {name for name, plan in plans.items() if plan[5] > 0} == {"tables in device memory"}
    assert not any(plan[5] for plan in forward.values())
    assert plans["rows of 64 bytes"][:3] == (1, 1, 2)
    assert plans["float32 staged"][3] == 1  # one block walks over all three tiles of a sample
    assert plans["bfloat16 staged, several tiles"][3] == 3  # one block per tile
    assert plans["one channel"][2] == 0  # no idle lanes
    assert forward["next tile comes ahead"][:2] == (1, 2)


# One block walks over four tiles; forward, the next one comes while one is worked on.
SMALL = Case(
    "small",
    channels=128,
    batch=1,
    height=9,
    width=12,
    multiprocessors=1,
    shared_per_multiprocessor=33000,
)


# Barrier calls of SMALL, left out one at a time. Forward: before and after the gather of every
# tile; after the last but one nothing is overwritten. Backward: after clearing the counts, after
# counting, inside and after the scan, around the places of two chunks, after the order of cells and
# the lengths of the lists, inside and after their scan; before the gathers of every tile, before
# the next tokens, before the next gradients; after clamping, and around the sums over slices.
FORWARD = [0, 1, 2, 3, 4, 6]
BACKWARD = list(range(26))
BARRIERS = [*((1, index) for index in FORWARD), *((2, index) for index in BACKWARD)]


@pytest.mark.parametrize(("passes", "barrier"), BARRIERS)
def test_thread_sanitizer_finds_a_missing_barrier(
    passes: int, barrier: int, drivers: dict[str, Path], tmp_path: Path
) -> None:
    case = replace(SMALL, passes=passes)
    writer = partial(write_cases, cases=(case,))
    done = run_faulty(drivers["thread"], tmp_path, writer, "--skip-barrier", str(barrier)).done
    assert done.returncode != 0
    assert "ThreadSanitizer" in done.stderr  # a data race, or what came of reading poison


@pytest.mark.parametrize("passes", [1, 2])
def test_address_sanitizer_finds_a_step_past_shared_memory(
    passes: int, drivers: dict[str, Path], tmp_path: Path
) -> None:
    case = replace(SMALL, passes=passes)
    writer = partial(write_cases, cases=(case,))
    done = run(drivers["address"], tmp_path, writer, "--missing-shared", "4").done
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
