"""The CUDA kernels of the image warp, run with host threads, plain and under the sanitizers."""

from __future__ import annotations

import itertools
import math
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

from gsalign_kernels.reference import tps as reference
from gsalign_kernels.warp import MODES, PADDING_MODES

FORWARD, IMAGE_GRADIENT, SPLINE_GRADIENT = 1, 2, 4
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "channels last", "odd")
NAMES = ("output", "d image", "d coefficients", "d control points")
# Relative error of a whole tensor. Positions are float32, and what is sampled there changes by the
# image's slope; half types are rounded once on top.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-4, torch.bfloat16: 3e-3}
SPLINE_TOLERANCE = 2e-4
WILD = (math.nan, math.inf, -math.inf, 1e30, -1e30)

pytestmark = needs_compiler


@dataclass(frozen=True)
class Case:
    """One launch of the kernels: a problem, and the chip that the plans are made for."""

    name: str
    dtype: torch.dtype = torch.float32
    batch: int = 2
    channels: int = 3
    height: int = 5
    width: int = 7
    out_height: int = 6
    out_width: int = 9
    points: int = 4
    mode: str = "bilinear"
    padding: str = "zeros"
    align_corners: bool = True
    layout: str = "contiguous"
    threads: int = 64
    multiprocessors: int = 1
    passes: int = FORWARD | IMAGE_GRADIENT | SPLINE_GRADIENT
    repeats: int = 1
    coordinates: str = "spline"
    under_threads: bool = True  # whether the thread sanitizer, which is slow, sees this case

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Image and gradient (rounded to the type), coefficients, control points, all float32."""
        generator = torch.Generator().manual_seed(len(self.name) + 31 * self.channels)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator)

        image = normal(self.batch, self.channels, self.height, self.width)
        grad = normal(self.batch, self.channels, self.out_height, self.out_width)
        image, grad = (tensor.to(self.dtype).float() for tensor in (image, grad))
        control_points = 0.7 * normal(self.batch, self.points, 2)
        coefficients = torch.zeros(self.batch, self.points + 3, 2)
        coefficients[:, : self.points] = 0.8 / self.points * normal(self.batch, self.points, 2)
        coefficients[:, -3] = 0.1 * normal(self.batch, 2)
        coefficients[:, -2:] = 1.2 * torch.eye(2)
        if self.coordinates == "identity":
            coefficients[:, :-2] = 0
            coefficients[:, -2:] = torch.eye(2)
        elif self.coordinates == "magnified":  # many output pixels read the same few
            coefficients[:, : self.points] *= 0.1
            coefficients[:, -2:] *= 0.1
        elif self.coordinates == "minified":  # image pixels far apart are read
            coefficients[:, -2:] *= 5
        elif self.coordinates == "corner":  # every output pixel reads the same one
            coefficients[:, :] = 0
            coefficients[:, -3] = 3.0
        elif self.coordinates == "wild":  # samples in turn read at every wild position
            coefficients[:, :] = 0
            for sample in range(self.batch):
                coefficients[sample, -3] = torch.tensor(
                    [WILD[sample % 5], (0.1, *WILD)[sample % 6]]
                )
        return image, grad, coefficients, control_points


SETTINGS = tuple(itertools.product(MODES, PADDING_MODES, (True, False)))
CASES = (
    *(
        Case(
            f"{mode}, {padding}, {'centres' if align_corners else 'edges'}, {dtype}",
            dtype,
            mode=mode,
            padding=padding,
            align_corners=align_corners,
            repeats=2,
            under_threads=padding == "zeros",
        )
        for (mode, padding, align_corners), dtype in zip(SETTINGS, 4 * DTYPES, strict=True)
    ),
    *(
        Case(f"wild, {mode}, {padding}", mode=mode, padding=padding, batch=6, channels=2,
             coordinates="wild", align_corners=mode == "bilinear", under_threads=False)
        for mode, padding in itertools.product(MODES, PADDING_MODES)
    ),
    *(
        Case(f"{height} x {width} from {padding}", height=height, width=width, out_height=width,
             out_width=height, padding=padding, align_corners=padding != "zeros",
             under_threads=False)
        for (height, width), padding in itertools.product(
            ((1, 9), (9, 1), (1, 1)), PADDING_MODES)
    ),
    Case("channels last, vectors", channels=40, layout="channels last", repeats=2),
    Case("channels last, half vectors", torch.float16, channels=40, layout="channels last"),
    Case("channels last, bfloat16 vectors", torch.bfloat16, channels=8, layout="channels last",
         padding="border"),
    Case("channels last, no vectors", torch.bfloat16, channels=17, layout="channels last"),
    Case("odd strides", channels=17, layout="odd", padding="reflection"),
    Case("odd strides of one channel", torch.float16, channels=1, layout="odd"),
    Case("one channel", channels=1, padding="border"),
    Case("channels over blocks", channels=40, multiprocessors=4, repeats=2),
    Case("several patches", height=13, width=70, out_height=11, out_width=41, batch=1,
         under_threads=False),
    Case("several regions", height=9, width=20, out_height=66, out_width=70, batch=1, channels=1,
         coordinates="minified", under_threads=False),
    Case("identity", coordinates="identity", out_height=5, out_width=7, batch=1),
    Case("magnified", coordinates="magnified", out_height=24, out_width=24, batch=3, channels=9,
         repeats=2),
    Case("magnified, nearest", coordinates="magnified", out_height=24, out_width=24, batch=1,
         mode="nearest", under_threads=False),
    Case("minified", coordinates="minified", height=23, width=50, padding="reflection"),
    Case("corner", torch.float16, coordinates="corner", padding="border", out_height=20,
         out_width=20, repeats=2, batch=1, channels=5),
    Case("corner, nearest", coordinates="corner", padding="border", mode="nearest", out_height=20,
         out_width=20, batch=1, under_threads=False),
    Case("all outside", coordinates="corner", batch=1),
    Case("a block as on the GPU", threads=256, channels=9, batch=1, height=15, width=20,
         out_height=12, out_width=20, multiprocessors=2, under_threads=False),
    Case("long runs of pixels", out_height=40, out_width=30, batch=5, channels=1,
         passes=FORWARD | SPLINE_GRADIENT, under_threads=False),
    Case("many control points", points=70, batch=1),
    Case("chunks of control points", points=300, batch=1, channels=1, out_height=4, out_width=4,
         under_threads=False),
    Case("empty batch", batch=0),
    Case("no channels", channels=0),
)  # fmt: skip
BY_BUILD = {
    "plain": CASES,
    "address": CASES,
    "thread": tuple(case for case in CASES if case.under_threads),
}


def write_cases(path: Path, cases: tuple[Case, ...]) -> None:
    with open(path, "wb") as file:
        for case in cases:
            header = (
                *(DTYPES.index(case.dtype), case.batch, case.channels, case.height, case.width),
                *(case.out_height, case.out_width, case.points, MODES.index(case.mode)),
                *(PADDING_MODES.index(case.padding), case.align_corners),
                *(LAYOUTS.index(case.layout), case.threads, case.multiprocessors),
                *(case.passes, case.repeats),
            )
            file.write(struct.pack("<16i", *header))
            for tensor in case.tensors():
                file.write(tensor.contiguous().numpy().tobytes())


@dataclass(frozen=True)
class Result:
    """What the driver wrote for one case: how the work was split, and the tensors of NAMES."""

    vectors: bool
    forward_groups: int
    gradient_groups: int
    spline_pixels: int
    gradient_blocks: int
    tensors: tuple[torch.Tensor, ...]


def read_results(path: Path, cases: tuple[Case, ...]) -> dict[str, Result]:
    read, results = Reader(path), {}
    for case in cases:
        plan = read.integers(5)
        tensors = []
        planes = (case.batch, case.channels)
        for shape in (
            (*planes, case.out_height, case.out_width),
            (*planes, case.height, case.width),
            (case.batch, case.points + 3, 2),
            (case.batch, case.points, 2),
        ):
            tensors.append(read.tensor(shape))
        results[case.name] = Result(bool(plan[0]), *plan[1:], tuple(tensors))
    read.finish()
    return results


def tamed(case: Case, grid: torch.Tensor) -> torch.Tensor:
    """The grid with ordinary coordinates that read what the wild ones have to.

    grid_sample reads out of bounds in its backward pass where a coordinate is NaN. NaN reads
    nothing with zeros padding, else the first pixel; infinity reads like it when reflected.
    """
    for axis, size in enumerate((case.width, case.height)):
        first = -1.0 if case.align_corners else 1.0 / size - 1.0
        lost = 9.0 if case.padding == "zeros" else first
        one = grid[..., axis].clone()
        infinite = one.isinf()
        one = torch.where(one.isnan(), lost, one)
        if case.padding == "reflection":
            one = torch.where(infinite, first, one)
        grid = torch.where(torch.arange(2) == axis, one.clamp(-1e6, 1e6).unsqueeze(-1), grid)
    return grid


def expected(case: Case) -> tuple[torch.Tensor, ...]:
    """Output and gradients in float64, by grid_sample on the float64 spline and autograd."""
    image, grad, coefficients, control_points = (t.double() for t in case.tensors())
    leaves = tuple(t.requires_grad_() for t in (image, coefficients, control_points))
    if case.batch == 0 or case.channels == 0:
        return grad, *(torch.zeros_like(leaf) for leaf in leaves)
    grid = reference.tps_grid(
        coefficients, control_points, (case.out_height, case.out_width), case.align_corners
    )
    if case.coordinates == "wild":
        grid = tamed(case, grid)
    output = torch.nn.functional.grid_sample(
        image, grid, mode=case.mode, padding_mode=case.padding, align_corners=case.align_corners
    )
    grads = torch.autograd.grad(output, leaves, grad, allow_unused=True)
    return output.detach(), *(
        torch.zeros_like(leaf) if gradient is None else gradient
        for leaf, gradient in zip(leaves, grads, strict=True)
    )


@pytest.fixture(scope="session")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The driver, compiled once per sanitizer."""
    return compile_drivers("warp_image_driver.cpp", tmp_path_factory.mktemp("image_drivers"))


@pytest.fixture(scope="session")
def runs(drivers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The cases of every build."""
    writers = {build: partial(write_cases, cases=cases) for build, cases in BY_BUILD.items()}
    return run_builds(drivers, tmp_path_factory.mktemp("image_runs"), writers)


@pytest.fixture(scope="session")
def results(runs: dict[str, Run]) -> dict[str, Result]:
    assert runs["plain"].done.returncode == 0, runs["plain"].done.stderr
    return read_results(runs["plain"].results, CASES)


@pytest.mark.parametrize("build", BUILDS)
def test_runs_clean_and_twice_the_same(build: str, runs: dict[str, Run]) -> None:
    assert_clean(runs[build])


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.coordinates != "wild"], ids=lambda case: case.name
)
def test_kernels_match_grid_sample(case: Case, results: dict[str, Result]) -> None:
    passes = (FORWARD, IMAGE_GRADIENT, SPLINE_GRADIENT, SPLINE_GRADIENT)
    pairs = zip(results[case.name].tensors, expected(case), strict=True)
    for name, asked, (actual, wanted) in zip(NAMES, passes, pairs, strict=True):
        if not case.passes & asked:
            continue
        assert bool(actual.isfinite().all()), name  # also: nothing was left poisoned
        if case.coordinates == "identity" and asked == SPLINE_GRADIENT:
            continue  # positions on the pixels' centres, where the slope has two sides
        tolerance = SPLINE_TOLERANCE if asked == SPLINE_GRADIENT else TOLERANCE[case.dtype]
        assert relative_error(actual, wanted) <= tolerance, name


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.coordinates == "wild"], ids=lambda case: case.name
)
def test_wild_positions_read_what_grid_sample_reads(case: Case, results: dict[str, Result]) -> None:
    output, grad_image, *grad_spline = results[case.name].tensors
    wanted, wanted_image, *wanted_spline = expected(case)
    positions = case.tensors()[2][:, -3]
    # Which pixel so many reflections end on is rounding; it has to be one of the image.
    vague = (positions.abs() == 1e30).any(-1) & (case.padding == "reflection")
    lost = positions.isnan().any(-1) & (case.padding == "zeros") & (case.mode == "bilinear")
    lost |= positions.isinf().any(-1) & (case.padding == "zeros") & (case.mode == "bilinear")
    assert bool(output[lost].isnan().all())
    plain = ~vague & ~lost
    assert relative_error(output[plain], wanted[plain]) <= TOLERANCE[case.dtype]
    assert relative_error(grad_image[~vague], wanted_image[~vague]) <= TOLERANCE[case.dtype]
    largest = case.tensors()[0].abs().max()
    assert bool((output[vague].abs() <= largest).all())
    assert bool(grad_image.isfinite().all())
    sums = case.tensors()[1].sum((2, 3))
    torch.testing.assert_close(grad_image[vague].sum((2, 3)), sums[vague], rtol=1e-4, atol=1e-4)
    for actual, wanted in zip(grad_spline, wanted_spline, strict=True):
        assert bool(actual.isfinite().all())
        assert relative_error(actual[~vague], wanted[~vague]) <= SPLINE_TOLERANCE


def test_cases_reach_every_path(results: dict[str, Result]) -> None:
    assert {name for name, result in results.items() if result.vectors} == {
        "channels last, vectors",
        "channels last, half vectors",
        "channels last, bfloat16 vectors",
    }
    assert results["channels over blocks"].forward_groups == 5
    assert results["channels over blocks"].gradient_groups > 1
    assert results["channels last, vectors"].forward_groups == 2
    assert results["long runs of pixels"].spline_pixels == 1024
    assert results["a block as on the GPU"].spline_pixels == 64  # four threads to a pixel
    assert results["nearest, zeros, centres, torch.float32"].spline_pixels == 0


SMALL = Case("small", batch=1, channels=5, threads=128, multiprocessors=8)
FULL = replace(SMALL, name="full", out_height=18, out_width=18, coordinates="magnified", threads=64)

# Barrier calls of every thread of a block, left out one at a time in one launch: (case, pass,
# launch of that pass, calls). Forward: after the control points are staged. Boxes: the same, and
# before the region's. Image gradient: inside and after the search of regions, tiles and pixels;
# around the counts, inside and after the scan, before the places are counted, before the gather
# (the call after the last pixels found has another behind it before anything is read). FULL lists
# 256 pixels at a time: chunks of the sort, the gather, the next list. Spline gradient: control
# points, sums over slices of the channels, before the tile is read, and the sums over its points.
BARRIERS = (
    (SMALL, FORWARD, 0, range(1)),
    (SMALL, IMAGE_GRADIENT, 0, range(2)),
    (SMALL, IMAGE_GRADIENT, 1, (*range(5), *range(6, 12))),
    (FULL, IMAGE_GRADIENT, 1, range(16, 26)),
    (SMALL, SPLINE_GRADIENT, 0, range(4)),
)


@pytest.mark.parametrize(
    ("case", "passes", "launch", "barrier"),
    [
        pytest.param(case, passes, launch, barrier, id=f"{case.name}-{passes}-{launch}-{barrier}")
        for case, passes, launch, calls in BARRIERS
        for barrier in calls
    ],
)
def test_thread_sanitizer_finds_a_missing_barrier(
    case: Case, passes: int, launch: int, barrier: int, drivers: dict[str, Path], tmp_path: Path
) -> None:
    writer = partial(write_cases, cases=(replace(case, passes=passes),))
    faults = ("--skip-barrier", str(barrier), "--launch", str(launch))
    done = run_faulty(drivers["thread"], tmp_path, writer, *faults).done
    assert done.returncode != 0
    assert "ThreadSanitizer" in done.stderr  # a data race, or what came of reading poison


@pytest.mark.parametrize(
    ("passes", "launch"),
    [(FORWARD, 0), (IMAGE_GRADIENT, 0), (IMAGE_GRADIENT, 1), (SPLINE_GRADIENT, 0)],
)
def test_address_sanitizer_finds_a_step_past_shared_memory(
    passes: int, launch: int, drivers: dict[str, Path], tmp_path: Path
) -> None:
    writer = partial(write_cases, cases=(replace(SMALL, passes=passes),))
    faults = ("--missing-shared", "4", "--launch", str(launch))
    done = run(drivers["address"], tmp_path, writer, *faults).done
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
