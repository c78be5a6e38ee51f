"""The cache of ``tps_basis``: the same bits, nobody's edits, nothing kept without values."""

from __future__ import annotations

import copy
import multiprocessing
import threading

import pytest
import torch
from support import bitwise_equal, random
from torch._subclasses import FakeTensorMode
from torch.func import vmap

import gsalign_kernels as kernels
from gsalign_kernels import basis_cache

SIZE = (5, 4)


def control_points(count: int = 6, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return random(count, 2, seed=count, dtype=dtype)


@pytest.fixture(autouse=True)
def empty_cache():
    basis_cache.tps_basis_cache_clear()
    yield
    basis_cache.tps_basis_cache_clear()


def counts() -> tuple[int, int, int]:
    info = basis_cache.tps_basis_cache_info()
    return info.hits, info.misses, info.entries


def test_a_second_call_gets_the_same_bits():
    first = kernels.tps_basis(control_points(), SIZE)
    second = kernels.tps_basis(control_points().clone(), list(SIZE))
    assert bitwise_equal(first, second) and counts() == (1, 1, 1)
    assert basis_cache.tps_basis_cache_info().bytes == first.nbytes
    basis_cache.tps_basis_cache_clear()
    assert basis_cache.tps_basis_cache_info() == (0, 0, 0, 0)
    assert bitwise_equal(kernels.tps_basis(control_points(), SIZE), first)


def test_everything_that_matters_is_in_the_key():
    points = control_points()
    moved = points.clone()
    moved[0, 0] = torch.nextafter(moved[0, 0], torch.tensor(9.0))
    calls = [
        lambda: kernels.tps_basis(points, SIZE),
        lambda: kernels.tps_basis(moved, SIZE),
        lambda: kernels.tps_basis(points, SIZE[::-1]),
        lambda: kernels.tps_basis(points, SIZE, align_corners=False),
        lambda: kernels.tps_basis(points, SIZE, regularization=0.1),
        lambda: kernels.tps_basis(points.double(), SIZE),
        lambda: kernels.tps_basis(points, SIZE, implementation="reference"),
    ]
    results = [call() for call in calls]
    assert counts() == (0, len(calls), len(calls))
    for call, result in zip(calls, results, strict=True):
        assert bitwise_equal(call(), result)
    assert results[5].dtype == torch.float64
    # The same values through other strides, and the choice made by a context.
    kernels.tps_basis(points.t().contiguous().t(), SIZE)
    with kernels.use_kernels("reference"):
        kernels.tps_basis(points, SIZE)
    assert counts() == (len(calls) + 2, len(calls), len(calls))


def test_edited_control_points_are_other_control_points():
    points = control_points()
    before = kernels.tps_basis(points, SIZE)
    points[0] += 0.5
    after = kernels.tps_basis(points, SIZE)
    assert not torch.equal(before, after)
    points.data[0] -= 0.5  # not counted by autograd, seen all the same
    assert counts() == (0, 2, 2)
    kernels.tps_basis(points, SIZE)


def test_editing_a_result_reaches_nobody():
    points = control_points()
    first, second = kernels.tps_basis(points, SIZE), kernels.tps_basis(points, SIZE)
    wanted = second.clone()
    first.zero_()
    second.requires_grad_()
    third = kernels.tps_basis(points, SIZE)
    assert bitwise_equal(second, wanted) and bitwise_equal(third, wanted)
    assert not third.requires_grad and third.grad_fn is None


def test_parameters_and_gradients():
    points = torch.nn.Parameter(control_points())
    for _ in range(2):
        basis = kernels.tps_basis(points, SIZE)
        assert not basis.requires_grad and type(basis) is torch.Tensor
    with torch.no_grad():
        points.add_(0.1)
    assert not torch.equal(kernels.tps_basis(points, SIZE), basis)
    assert counts() == (1, 2, 2)


def test_made_in_inference_mode_it_serves_training():
    with torch.inference_mode():
        points = control_points()
        inside = kernels.tps_basis(points, SIZE)
        assert inside.is_inference()
    outside = kernels.tps_basis(control_points(), SIZE)
    assert not outside.is_inference() and counts() == (1, 1, 1)
    values = random(6, 2, seed=1, dtype=torch.float32, grad=True)
    (outside @ values).sum().backward()
    assert bitwise_equal(inside.clone(), outside)


def test_bounded_in_number(monkeypatch):
    monkeypatch.setattr(basis_cache, "MAXIMUM_ENTRIES", 3)
    for width in (2, 3, 4):
        kernels.tps_basis(control_points(), (2, width))
    kernels.tps_basis(control_points(), (2, 2))  # now the most recently used
    kernels.tps_basis(control_points(), (2, 5))
    assert counts() == (1, 4, 3)
    kernels.tps_basis(control_points(), (2, 2))
    assert counts() == (2, 4, 3)
    kernels.tps_basis(control_points(), (2, 3))
    assert counts() == (2, 5, 3)


def test_bounded_in_bytes(monkeypatch):
    size = 6 * 2 * 4 * 4
    monkeypatch.setattr(basis_cache, "MAXIMUM_BYTES", 2 * size)
    for width in (4, 3, 4, 2):
        kernels.tps_basis(control_points(), (2, width))
    assert basis_cache.tps_basis_cache_info().bytes <= 2 * size
    before = basis_cache.tps_basis_cache_info()
    kernels.tps_basis(control_points(), (20, 20))  # too large to keep, displaces nothing
    after = basis_cache.tps_basis_cache_info()
    assert (after.entries, after.bytes) == (before.entries, before.bytes)


def test_errors_are_raised_again_and_nothing_is_kept():
    for _ in range(2):
        with pytest.raises(RuntimeError):
            kernels.tps_basis(torch.zeros(4, 2), SIZE)
        with pytest.raises(ValueError, match="size"):
            kernels.tps_basis(control_points(), (0, 3))
        with pytest.raises(kernels.KernelUnavailableError):
            kernels.tps_basis(control_points(), SIZE, implementation="cuda")
    assert basis_cache.tps_basis_cache_info().entries == 0


def test_compiled_and_exported_programs_compute_it_themselves():
    def function(points):
        return kernels.tps_basis(points, SIZE).sin()

    kernels.tps_basis(control_points(), SIZE)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for shift in (0.0, 0.25):
        points = control_points() + shift * torch.eye(6, 2)
        assert bitwise_equal(compiled(points), function(points))
    hits = counts()[0]
    compiled(control_points())
    assert counts()[0] == hits

    class Basis(torch.nn.Module):
        def forward(self, points):
            return function(points)

    for strict in (False, True):
        program = torch.export.export(Basis(), (control_points(),), strict=strict)
        other = control_points() + 0.25 * torch.eye(6, 2)
        assert bitwise_equal(program.module()(other), function(other))


def test_fake_tensors_and_transforms_leave_no_trace():
    with FakeTensorMode() as mode:
        fake = kernels.tps_basis(mode.from_tensor(control_points()), SIZE)
        real_inside = kernels.tps_basis(torch.empty(6, 2), SIZE)
    assert fake.shape == (20, 6) and type(real_inside) is type(fake)
    assert kernels.tps_basis(control_points().to("meta"), SIZE, implementation="reference").is_meta
    assert counts() == (0, 0, 0)
    many = torch.stack([control_points(), control_points() + 0.1 * torch.eye(6, 2)])
    mapped = vmap(lambda points: kernels.tps_basis(points, SIZE))(many)
    assert counts() == (0, 0, 0)

    def loss(values):
        return (kernels.tps_basis(points, SIZE) @ values).square().sum()

    points = control_points()
    gradient = torch.func.grad(loss)(torch.eye(6, 2))
    assert gradient.isfinite().all() and counts() == (0, 0, 0)
    for index in range(2):
        torch.testing.assert_close(mapped[index], kernels.tps_basis(many[index], SIZE))


def test_deep_copies_and_pickles_are_plain_tensors():
    module = torch.nn.Module()
    module.register_buffer("basis", kernels.tps_basis(control_points(), SIZE))
    twin = copy.deepcopy(module)
    twin.basis.zero_()
    assert bitwise_equal(module.basis, kernels.tps_basis(control_points(), SIZE))


def test_many_threads():
    wanted = {width: kernels.tps_basis(control_points(), (3, width)) for width in range(2, 8)}
    basis_cache.tps_basis_cache_clear()
    wrong: list[object] = []

    def work() -> None:
        try:
            for turn in range(60):
                width = 2 + turn % 6
                basis = kernels.tps_basis(control_points(), (3, width))
                if not torch.equal(basis, wanted[width]):
                    wrong.append(width)
                basis.fill_(7.0)
                if turn % 20 == 19:
                    basis_cache.tps_basis_cache_clear()
        except Exception as error:
            wrong.append(error)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def _in_a_child(queue) -> None:
    queue.put(tuple(kernels.tps_basis(control_points(), SIZE).shape))


def test_a_forked_child_starts_with_its_own_lock():
    """As a data loader's workers do, while another thread of the parent may hold the lock."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with basis_cache._cache._lock:
        child = context.Process(target=_in_a_child, args=(queue,))
        child.start()
    assert queue.get(timeout=60) == (20, 6)
    child.join(timeout=60)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
class TestOnTheGpu:
    def test_values_are_read_once_per_tensor_and_write(self, monkeypatch):
        reads: list[int] = []
        read = basis_cache._read
        monkeypatch.setattr(basis_cache, "_read", lambda t: reads.append(1) or read(t))
        points = control_points().cuda()
        for _ in range(3):
            basis = kernels.tps_basis(points, SIZE)
        assert len(reads) == 1
        points.add_(0.25 * torch.eye(6, 2, device="cuda"))
        assert not torch.equal(kernels.tps_basis(points, SIZE), basis) and len(reads) == 2
        other = kernels.tps_basis(control_points().cuda(), SIZE)  # equal values, another tensor
        assert torch.equal(other, basis) and len(reads) == 3
        assert basis_cache.tps_basis_cache_info().entries == 2

    def test_addresses_are_handed_out_again(self):
        for shift in (0.0, 0.25, 0.5):
            points = (control_points() + shift * torch.eye(6, 2)).cuda()
            basis = kernels.tps_basis(points, SIZE)
            basis_cache.tps_basis_cache_clear()
            assert torch.equal(basis, kernels.tps_basis(points, SIZE))
            del points

    def test_other_streams_wait_for_the_one_that_made_it(self):
        points = control_points().cuda()
        torch.cuda.synchronize()
        wanted = kernels.tps_basis(points, (64, 64))
        basis_cache.tps_basis_cache_clear()
        first, second = torch.cuda.Stream(), torch.cuda.Stream()
        with torch.cuda.stream(first):
            torch.cuda._sleep(50_000_000)
            kernels.tps_basis(points, (64, 64))
        with torch.cuda.stream(second):
            copied = kernels.tps_basis(points, (64, 64))
        torch.cuda.synchronize()
        assert torch.equal(copied, wanted)
