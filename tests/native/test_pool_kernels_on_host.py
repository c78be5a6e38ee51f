"""The CUDA kernels of masked part pooling, run with host threads, plain and with sanitizers."""

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

from gsalign_kernels.pool import ACTIVATIONS, MODES, VISIBILITIES
from gsalign_kernels.reference import pool as reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Relative error of a whole tensor; half types are computed in float32 and rounded once.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}

pytestmark = needs_compiler


@dataclass(frozen=True)
class Case:
    """One call of both passes, and the chip that the plan is made for."""

    name: str
    dtype: torch.dtype = torch.float32
    batch: int = 2
    parts: int = 3
    background: bool = False
    positions: int = 9
    prefix: int = 1
    channels: int = 24
    gap: int = 0
    shared: bool = False
    mode: str = "weighted_mean"
    activation: str | None = None
    visibility: str = "continuous"
    vectors: bool = True
    multiprocessors: int = 4
    repeats: int = 1
    eps: float = 1e-6
    values: str = "random"

    @property
    def mask_shape(self) -> tuple[int, ...]:
        shape = (self.parts + self.background, self.positions)
        return shape if self.shared else (self.batch, *shape)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Tokens, masks, gradients of pooled tokens (rounded to the type) and visibilities."""
        generator = torch.Generator().manual_seed(len(self.name) + 31 * self.channels)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator)

        tokens = normal(self.batch, self.prefix + self.positions, self.channels)
        masks = normal(*self.mask_shape)
        upstream = normal(self.batch, self.parts, self.channels)
        seen = normal(self.batch, self.parts)
        if self.activation is None:
            masks = masks.abs()
        if self.values == "ties":  # the first of equal ones counts
            masks, tokens = torch.ones_like(masks), torch.ones_like(tokens)
        if self.values == "extreme":
            masks = 10.0 * masks
            masks[..., 0, :2] = 300.0
            masks[..., 1, :] = -math.inf
            seen = 0 * seen  # where several weights round to 1, types differ on the first
        tokens, upstream = (t.to(self.dtype).float() for t in (tokens, upstream))
        return tokens, masks, upstream, seen


CASES = (
    Case("one part", parts=1, positions=37, channels=136, repeats=2),
    Case("one part, halves", torch.bfloat16, parts=1, channels=264, prefix=0),
    Case("three parts", torch.float16, mode="mean", activation="sigmoid", positions=20),
    Case("six parts", parts=6, positions=21, channels=140, activation="softmax", repeats=2),
    Case("six parts, halves", torch.bfloat16, parts=6, channels=272, activation="softmax"),
    Case("eight parts, halves", torch.float16, parts=8, channels=264, gap=8, positions=18),
    Case("nine parts", parts=9, background=True, activation="softmax", channels=36),
    Case("33 parts, halves", torch.bfloat16, parts=33, channels=264, mode="mean", batch=1),
    Case("columns by tiles", parts=40, channels=260, activation="softmax", batch=1),
    Case("single values", parts=5, channels=7, gap=3, activation="sigmoid", background=True),
    Case("single values, halves", torch.float16, parts=2, channels=33, prefix=2),
    Case("single values, 20 parts", torch.bfloat16, parts=20, channels=5, visibility="binary"),
    Case("no vectors by alignment", channels=16, vectors=False, positions=5),
    Case("one channel", channels=1, parts=1, mode="max"),
    Case("shared", torch.bfloat16, batch=11, shared=True, activation="softmax", positions=34),
    Case("shared mean", batch=3, parts=10, shared=True, mode="mean", background=True, repeats=2),
    Case("shared by one", batch=1, shared=True, activation="sigmoid"),
    Case("maxima", mode="max", parts=6, positions=19, channels=40, repeats=2),
    Case("maxima, halves", torch.bfloat16, mode="max", activation="softmax", channels=48, gap=16),
    Case("maxima, shared", mode="max", parts=2, shared=True, channels=9, activation="sigmoid"),
    Case("ties", values="ties", visibility="continuous", parts=2),
    Case("ties of maxima", values="ties", mode="max", positions=40),
    Case("extreme logits", values="extreme", activation="softmax", positions=40),
    Case("extreme sigmoids", values="extreme", activation="sigmoid", mode="mean"),
    Case("binary", visibility="binary", background=True, parts=4, positions=40),
    Case("binary, softmax", visibility="binary", activation="softmax", shared=True, mode="mean"),
    Case("clamped totals", eps=8.0, positions=10, parts=4),
    Case("many positions", positions=530, parts=2, channels=8, batch=1),
    Case("more positions", torch.float16, positions=1030, channels=8, batch=1, parts=1),
    Case("stretches", positions=1030, parts=9, channels=4, batch=1, activation="sigmoid"),
    Case("stretches of maxima", positions=520, channels=4, batch=1, parts=13, mode="max"),
    Case("wide tile", parts=4, channels=260, multiprocessors=1, batch=3, positions=33),
    Case("no samples", batch=0),
    Case("no samples, shared", batch=0, shared=True, activation="softmax"),
    Case("no parts", parts=0, background=True, activation="sigmoid"),
    Case("no positions", positions=0, prefix=3),
    Case("no positions of maxima", positions=0, mode="max", visibility="binary"),
    Case("no channels", channels=0, activation="softmax"),
)


def expected(case: Case) -> tuple[torch.Tensor, ...]:
    """Pooled tokens, visibilities and both gradients in float64, by the reference and autograd."""
    tokens, masks, upstream, seen = (t.double() for t in case.tensors())
    tokens, masks = tokens.requires_grad_(), masks.requires_grad_()
    pooled, visibility = reference.masked_part_pool(
        tokens,
        masks,
        case.prefix,
        case.mode,
        case.activation,
        case.background,
        case.visibility,
        case.eps,
    )
    results = (pooled, visibility) if visibility.requires_grad else (pooled,)
    grads = torch.autograd.grad(results, (tokens, masks), (upstream, seen)[: len(results)])
    return pooled.detach(), visibility.detach(), *grads


def write_cases(path: Path, cases: tuple[Case, ...]) -> None:
    with open(path, "wb") as file:
        for case in cases:
            header = (
                DTYPES.index(case.dtype),
                *(case.batch, case.parts, case.background, case.positions, case.prefix),
                *(case.channels, case.gap, case.shared, MODES.index(case.mode)),
                *(ACTIVATIONS.index(case.activation), VISIBILITIES.index(case.visibility)),
                *(case.vectors, case.multiprocessors, case.repeats, 0),
            )
            file.write(struct.pack("<16i", *header))
            file.write(struct.pack("<f", case.eps))
            for tensor in case.tensors():
                file.write(tensor.contiguous().numpy().tobytes())


@dataclass(frozen=True)
class Result:
    """What the driver wrote for one case.

    Plans: forward (vectors, whole table, parts at once, lane bits, group bits, parts and rows of
    the table, bytes of shared memory); backward (vectors, parts at once, parts filled up, units,
    columns, bytes of shared memory).
    """

    forward_plan: tuple[int, ...]
    backward_plan: tuple[int, ...]
    tensors: dict[str, torch.Tensor]


def read_results(path: Path, cases: tuple[Case, ...]) -> dict[str, Result]:
    read, results = Reader(path), {}
    for case in cases:
        plans = read.integers(14)
        tokens = (case.batch, case.prefix + case.positions, case.channels)
        parts = (case.batch, case.parts)
        shapes = {
            "pooled": (np.float32, (*parts, case.channels)),
            "visibility": (np.float32, parts),
            "totals": (np.float32, parts),
            "peaks": (np.int32, parts),
            "winners": (np.int32, (*parts, case.channels) if case.mode == "max" else (0,)),
            "grad_tokens": (np.float32, tokens),
            "grad_masks": (np.float32, case.mask_shape),
        }
        tensors = {}
        for name, (kind, shape) in shapes.items():
            tensors[name] = read.tensor(shape, kind)
        results[case.name] = Result(plans[:8], plans[8:], tensors)
    read.finish()
    return results


@pytest.fixture(scope="session")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return compile_drivers("pool_driver.cpp", tmp_path_factory.mktemp("drivers"))


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
def test_kernels_match_the_reference(case: Case, results: dict[str, Result]) -> None:
    tensors = results[case.name].tensors
    names = ("pooled", "visibility", "grad_tokens", "grad_masks")
    for name, wanted in zip(names, expected(case), strict=True):
        actual = tensors[name]
        tolerance = TOLERANCE[case.dtype if name in ("pooled", "grad_tokens") else torch.float32]
        assert bool(actual.isfinite().all()), name  # also: nothing was left poisoned
        assert relative_error(actual, wanted) <= tolerance, name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_totals_peaks_and_winners(case: Case, results: dict[str, Result]) -> None:
    tokens, masks, *_ = (t.double() for t in case.tensors())
    tensors = results[case.name].tensors
    weights = reference.part_weights(masks, case.activation)[..., int(case.background) :, :]
    weights = weights.expand(case.batch, -1, -1)
    assert relative_error(tensors["totals"], weights.sum(-1)) < 1e-6
    if case.visibility == "binary" or case.positions == 0:
        assert bool((tensors["peaks"] == -1).all())
    elif case.values != "extreme":  # where weights round to 1, types differ on the first
        assert torch.equal(tensors["peaks"].long(), weights.argmax(-1))
    if case.mode == "max" and case.positions == 0:
        assert bool((tensors["winners"] == -1).all())
    elif case.mode == "max":
        values = weights.unsqueeze(-1) * tokens[:, case.prefix :].unsqueeze(1)
        chosen = values.gather(2, tensors["winners"].long().unsqueeze(2)).squeeze(2)
        torch.testing.assert_close(chosen, values.amax(2), rtol=1e-6, atol=0)
        if case.values == "ties":
            assert not tensors["winners"].any()


def test_cases_reach_every_path(results: dict[str, Result]) -> None:
    forward = {name: result.forward_plan for name, result in results.items()}
    backward = {name: result.backward_plan for name, result in results.items()}
    for plans in (forward, backward):
        assert {plan[0] for plan in plans.values()} == {0, 1}
    assert {plan[2] for plan in forward.values()} == {1, 4, 6, 8}
    assert {name for name, plan in forward.items() if not plan[1]} == {
        "stretches",
        "stretches of maxima",
    }
    assert {plan[4] for plan in forward.values()} == {3, 4, 5}
    assert {plan[3] for plan in forward.values()} == {0, 1, 2, 3, 5}
    assert backward["columns by tiles"][4] < 260 // 4
    assert backward["33 parts, halves"][2] == 40


SMALL = Case("small", channels=64, positions=20, parts=9, prefix=0, multiprocessors=1)


# Barrier calls of SMALL, left out one at a time. Forward: after the weights are made, after the
# groups' sums of the first round are stored, before those of the second. Backward: after shared
# memory is filled, after the dot products. Finishing: after the gradients are gathered.
BARRIERS = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (2, 0)]


@pytest.mark.parametrize(("launch", "barrier"), BARRIERS)
def test_thread_sanitizer_finds_a_missing_barrier(
    launch: int, barrier: int, drivers: dict[str, Path], tmp_path: Path
) -> None:
    writer = partial(write_cases, cases=(SMALL,))
    options = ("--skip-barrier", str(barrier), "--launch", str(launch))
    done = run_faulty(drivers["thread"], tmp_path, writer, *options).done
    assert done.returncode != 0
    assert "ThreadSanitizer" in done.stderr  # a data race, or what came of reading poison


# A table by stretches is filled again after a barrier of its own; several samples that share masks
# meet twice; columns by tiles wait for the pooled gradients to be used up.
@pytest.mark.parametrize(
    ("case", "launch", "barrier"),
    [
        (replace(SMALL, positions=1030, channels=8, batch=1), 0, 1),
        (replace(SMALL, shared=True, batch=3), 2, 0),
        (replace(SMALL, shared=True, batch=3), 2, 1),
        (replace(SMALL, parts=40, channels=260), 1, 1),
    ],
)
def test_thread_sanitizer_finds_the_other_barriers(
    case: Case, launch: int, barrier: int, drivers: dict[str, Path], tmp_path: Path
) -> None:
    writer = partial(write_cases, cases=(case,))
    options = ("--skip-barrier", str(barrier), "--launch", str(launch))
    done = run_faulty(drivers["thread"], tmp_path, writer, *options).done
    assert done.returncode != 0
    assert "ThreadSanitizer" in done.stderr


@pytest.mark.parametrize(
    ("launch", "case"),
    [(0, replace(SMALL, visibility="binary")), (1, SMALL), (2, replace(SMALL, shared=True))],
)
def test_address_sanitizer_finds_a_step_past_shared_memory(
    launch: int, case: Case, drivers: dict[str, Path], tmp_path: Path
) -> None:
    writer = partial(write_cases, cases=(case,))
    # The last words are those of parts that fill up, or of a number of parts that is not reached.
    options = ("--missing-shared", str({0: 32, 1: 448 + 4, 2: 4}[launch]), "--launch", str(launch))
    done = run(drivers["address"], tmp_path, writer, *options).done
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
