"""The CUDA kernels of the prototype loss, run with host threads, plain and under the sanitizers."""

from __future__ import annotations

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

from gsalign_kernels.reference import prototype as reference

FORWARD, BOTH = 1, 3
NAMES = ("losses", "means", "norms", "d features", "d masks")
SLOPES = (1.3, 0.7)

pytestmark = needs_compiler


@dataclass(frozen=True)
class Case:
    """One call of both passes: a problem, and the chip that the plan is made for."""

    name: str
    batch: int = 8
    channels: int = 20
    classes: int = 3
    threads: int = 64
    vectors: bool = True
    multiprocessors: int = 1
    passes: int = BOTH
    repeats: int = 1
    figures: str = "random"
    under_threads: bool = True  # whether the thread sanitizer, which is slow, sees this case

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Features and masks in float32, labels."""
        generator = torch.Generator().manual_seed(len(self.name) + 31 * self.channels)
        features = torch.randn(self.batch, self.channels, generator=generator)
        masks = torch.rand(self.batch, self.channels, generator=generator)
        names = torch.arange(self.classes) * 7_000_000_000 - 3
        labels = names[torch.randint(self.classes, (self.batch,), generator=generator)]
        if self.figures == "kinks":  # a norm or a mask at each clamp
            labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 0])
            features[0] = 0.0
            features[3] = -features[2]
            masks[4] = 0.0
            masks[5] = 1e-20
            masks[7, :4] = torch.tensor([0.0, 1e-7, 1e-6, 1.0])
        elif self.figures == "wild":
            features[2, 1] = math.nan
            features[5, 0] = math.inf
            masks[4, 3] = math.nan
        elif self.figures == "sorted":
            labels = labels.sort().values
        elif self.figures == "extremes":
            limits = torch.iinfo(torch.int64)
            labels = torch.tensor([limits.min, limits.max, -1, 0])[labels % 4]
        return features, masks, labels


CASES = (
    Case("vectors", channels=200, repeats=2),
    Case("single values", channels=37, repeats=2),
    Case("not aligned", channels=24, vectors=False),
    Case("one sample", batch=1, classes=1),
    Case("one channel", channels=1),
    Case("one class", batch=13, classes=1, channels=8),
    Case("a class each", batch=9, classes=1000, channels=12, under_threads=False),
    Case("a warp of labels", batch=32, classes=5, channels=4),
    Case("rounds of labels", batch=101, classes=7, channels=12, threads=32),
    Case("several windows", batch=140, classes=4, channels=8, threads=32, repeats=2),
    Case(
        "several windows of one class",
        batch=140,
        classes=1,
        channels=8,
        threads=32,
        under_threads=False,
    ),
    Case(
        "sorted windows",
        batch=260,
        classes=3,
        channels=4,
        threads=32,
        figures="sorted",
        under_threads=False,
    ),
    Case("tiles share a block", batch=70, channels=400, classes=30, repeats=2),
    Case(
        "tiles and windows",
        batch=140,
        channels=72,
        classes=9,
        threads=32,
        vectors=False,
        under_threads=False,
    ),
    Case("kinks", figures="kinks"),
    Case("wild", figures="wild", batch=12, classes=4),
    Case("extreme labels", figures="extremes", batch=12, classes=4),
)


def expected(case: Case) -> tuple[torch.Tensor, ...]:
    """All results in float64, gradients by autograd."""
    features, masks, labels = case.tensors()
    features, masks = (t.double().requires_grad_() for t in (features, masks))
    losses = torch.stack(reference.masked_prototype_loss(features, masks, labels))
    means = reference.class_means(features.nan_to_num(0.0, 0.0), labels)
    products = torch.nn.functional.normalize(means, dim=1, eps=1e-12) * masks
    rows = (features.square().sum(1), products.square().sum(1), means.square().sum(1))
    lengths = [row.sqrt() for row in rows]
    norms = torch.stack([*lengths[:2], (features * products).sum(1), lengths[2]], 1)
    grads = torch.autograd.grad(losses, (features, masks), torch.tensor(SLOPES).double())
    return tuple(t.detach() for t in (losses, means, norms, *grads))


def write_cases(path: Path, cases: tuple[Case, ...]) -> None:
    with open(path, "wb") as file:
        for case in cases:
            header = (case.batch, case.channels, case.threads, case.vectors)
            header += (case.multiprocessors, case.passes, case.repeats)
            file.write(struct.pack("<7i", *header))
            # Rounded to float32, as the operator is given them.
            file.write(struct.pack("<2f", *SLOPES))
            for tensor in case.tensors():
                file.write(tensor.contiguous().numpy().tobytes())


@dataclass(frozen=True)
class Result:
    """What the driver wrote for one case."""

    vectors: bool
    tiles: int
    groups: int
    window: int
    class_threads: int
    row_threads: int
    tensors: tuple[torch.Tensor, ...]


def read_results(path: Path, cases: tuple[Case, ...]) -> dict[str, Result]:
    read, results = Reader(path), {}
    for case in cases:
        plan = read.integers(6)
        tensors = []
        rows = (case.batch, case.channels)
        for shape in ((2,), rows, (case.batch, 4), rows, rows):
            tensors.append(read.tensor(shape))
        results[case.name] = Result(bool(plan[0]), *plan[1:], tuple(tensors))
    read.finish()
    return results


@pytest.fixture(scope="session")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return compile_drivers("prototype_driver.cpp", tmp_path_factory.mktemp("drivers"))


@pytest.fixture(scope="session")
def runs(drivers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Every case under every build."""
    writers = dict.fromkeys(BUILDS, lambda path: write_cases(path, CASES))
    threaded = tuple(case for case in CASES if case.under_threads)
    writers["thread"] = lambda path: write_cases(path, threaded)
    return run_builds(drivers, tmp_path_factory.mktemp("runs"), writers)


@pytest.fixture(scope="session")
def results(runs: dict[str, Run]) -> dict[str, Result]:
    done = runs["plain"].done
    assert done.returncode == 0, done.stderr
    return read_results(runs["plain"].results, CASES)


@pytest.mark.parametrize("build", BUILDS)
def test_runs_clean_and_twice_the_same(build: str, runs: dict[str, Run]) -> None:
    assert_clean(runs[build])


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.figures not in ("wild", "kinks")], ids=lambda case: case.name
)
def test_kernels_match_the_reference(case: Case, results: dict[str, Result]) -> None:
    for name, actual, wanted in zip(NAMES, results[case.name].tensors, expected(case), strict=True):
        assert bool(actual.isfinite().all()), name  # also: nothing was left poisoned
        assert relative_error(actual, wanted) <= 2e-6, name


def test_clamped_norms_and_masks(results: dict[str, Result]) -> None:
    """Behind a clamp gradients are greater by many orders of magnitude: judged row by row."""
    case = next(case for case in CASES if case.name == "kinks")
    losses, _, _, *grads = results["kinks"].tensors
    wanted_losses, _, _, *wanted_grads = expected(case)
    assert relative_error(losses, wanted_losses) <= 2e-6
    for actual, wanted in zip(grads, wanted_grads, strict=True):
        for rows in ([0], [2, 3], [6], [1, 4, 5, 7]):
            assert relative_error(actual[rows], wanted[rows]) <= 8e-6, rows


def test_what_is_not_finite_spoils_its_class_and_no_other(results: dict[str, Result]) -> None:
    case = next(case for case in CASES if case.name == "wild")
    wanted, actual = expected(case), results["wild"].tensors
    labels = case.tensors()[2]
    whole = (labels != labels[2]) & (labels != labels[5]) & (labels != labels[4])
    assert 0 < int(whole.sum()) < case.batch
    assert torch.equal(actual[0].isnan(), wanted[0].isnan())
    for index in (1, 3, 4):
        assert bool(actual[index][whole].isfinite().all())
    for ours, theirs in zip(actual[3:], wanted[3:], strict=True):
        assert (
            bool(theirs[whole].isnan().any()) or relative_error(ours[whole], theirs[whole]) <= 2e-6
        )


def test_cases_reach_every_path(results: dict[str, Result]) -> None:
    assert {result.vectors for result in results.values()} == {True, False}
    assert results["tiles share a block"].groups == 1
    assert results["tiles share a block"].tiles == 4
    assert results["vectors"].groups == results["vectors"].tiles == 2
    assert results["tiles and windows"].groups < results["tiles and windows"].tiles
    for case in CASES:
        assert (case.batch > results[case.name].window) == ("windows" in case.name), case.name
    assert results["vectors"].class_threads == 32 and results["vectors"].row_threads == 64


# Blocks of two warps; those that own a class walk over two tiles.
SMALL = Case("small", batch=65, channels=256, classes=60, threads=128)

# Barrier calls per launch, left out one at a time. Means and backward: after the counts, after the
# list, at the sums, before the sums of the next tile. Rows: in the three sums, before the last
# block is known, in its sum.
BARRIERS = [
    *((0, index) for index in range(4)),
    *((1, index) for index in range(5)),
    *((2, index) for index in range(4)),
]


@pytest.mark.parametrize(("launch", "barrier"), BARRIERS)
def test_thread_sanitizer_finds_a_missing_barrier(
    launch: int, barrier: int, drivers: dict[str, Path], tmp_path: Path
) -> None:
    writer = partial(write_cases, cases=(SMALL,))
    options = ("--skip-barrier", str(barrier), "--launch", str(launch))
    done = run_faulty(drivers["thread"], tmp_path, writer, *options).done
    assert done.returncode != 0
    assert "ThreadSanitizer" in done.stderr  # a data race, or what came of reading poison


@pytest.mark.parametrize("launch", range(3))
def test_address_sanitizer_finds_a_step_past_shared_memory(
    launch: int, drivers: dict[str, Path], tmp_path: Path
) -> None:
    writer = partial(write_cases, cases=(replace(SMALL, batch=4, classes=1),))
    options = ("--missing-shared", "4" if launch == 0 else "16", "--launch", str(launch))
    done = run(drivers["address"], tmp_path, writer, *options).done
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
