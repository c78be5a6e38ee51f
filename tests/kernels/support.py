"""Assertions and tensor makers shared by the operator tests; test_support.py tests them.

Import it as ``from support import ...``: pytest puts each test's folder on the path.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from gsalign_kernels import backends

# Per type: largest relative error of the whole tensor in the 2-norm, and largest error of one
# element relative to the largest expected element. Half types are computed in float32 and rounded
# once, so theirs are half a unit in the last place and a little; float32's leaves room for sums of
# a few hundred terms.
TOLERANCES = {
    torch.float64: (1e-13, 1e-12),
    torch.float32: (2e-6, 1e-5),
    torch.float16: (4e-4, 1e-3),
    torch.bfloat16: (3e-3, 5e-3),
}


def assert_close_to_reference(
    actual: Tensor,
    expected: Tensor,
    dtype: torch.dtype,
    *,
    slack: float = 1.0,
    name: str = "result",
) -> None:
    """Fails unless ``actual`` is ``expected`` (float64) rounded to ``dtype``, or nearly.

    Checks shape and type; that both are finite throughout, so that elements a kernel forgot under
    :func:`poisoned_memory` show; the relative error in the 2-norm; and the largest error of an
    element relative to the largest expected element. Where everything expected is 0, everything
    must be exactly 0.

    Args:
        actual: what an implementation computed.
        expected: the same in float64.
        dtype: the type ``actual`` must have; it sets the tolerances.
        slack: factor on the tolerances, for results of long sums or of cancelling ones.
        name: what to call the tensor in the message.
    """
    assert isinstance(actual, Tensor), f"{name}: is a {type(actual).__name__}, not a tensor"
    assert actual.dtype == dtype, f"{name}: type {actual.dtype}, wanted {dtype}"
    assert expected.dtype == torch.float64, f"{name}: the expected figures must be float64"
    assert actual.shape == expected.shape, (
        f"{name}: shape {tuple(actual.shape)}, wanted {tuple(expected.shape)}"
    )
    actual = actual.detach().cpu().double()
    expected = expected.detach().cpu()
    assert expected.isfinite().all(), f"{name}: the expected figures are not finite"
    bad = int((~actual.isfinite()).sum())
    assert bad == 0, (
        f"{name}: {bad} of {actual.numel()} elements are NaN or infinite (or unwritten)"
    )
    if actual.numel() == 0:
        return
    norm_tolerance, element_tolerance = (slack * tolerance for tolerance in TOLERANCES[dtype])
    error = actual - expected
    largest = float(expected.abs().max())
    if largest == 0.0:
        assert float(error.abs().max()) == 0.0, f"{name}: wanted zeros, got {actual.abs().max()}"
        return
    norm_error = float(error.norm() / expected.norm())
    element_error = float(error.abs().max()) / largest
    assert norm_error <= norm_tolerance, (
        f"{name}: relative error {norm_error:.2e} in the norm, at most {norm_tolerance:.2e}"
    )
    assert element_error <= element_tolerance, (
        f"{name}: largest error {element_error:.2e} of the largest element, "
        f"at most {element_tolerance:.2e}, first at {first_difference(actual, expected)}"
    )


def first_difference(actual: Tensor, expected: Tensor) -> tuple[int, ...]:
    """Index of the element that differs most."""
    flat = int((actual - expected).abs().flatten().argmax())
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), actual.shape))


def bitwise_equal(left: Tensor, right: Tensor) -> bool:
    """Whether shape, type and every bit agree: 0 and -0 differ, equal NaNs do not."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    left, right = (t.detach().cpu().contiguous().flatten() for t in (left, right))
    return bool(torch.equal(left.view(torch.uint8), right.view(torch.uint8)))


def strided(tensor: Tensor) -> Tensor:
    """The same values as a view that is contiguous along no axis, with a storage offset.

    Between its elements lie NaN (or the largest integer), so that whoever reads past the strides
    shows it. A gradient asked of ``tensor`` is asked of the view as a leaf too.
    """
    if tensor.dim() == 0:
        return tensor
    filler = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    lengths = [2 * length + 3 for length in reversed(tensor.shape)]
    storage = torch.full(lengths, filler, dtype=tensor.dtype, device=tensor.device)
    view = storage.permute(*reversed(range(tensor.dim())))
    view = view[tuple(slice(1, 1 + 2 * length, 2) for length in tensor.shape)]
    with torch.no_grad():
        view.copy_(tensor)
    return view.requires_grad_(tensor.requires_grad)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills every tensor that PyTorch allocates uninitialised, also in native operators.

    With NaN, or the largest integer; so a kernel that leaves an element unwritten is found out.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs the block with this many PyTorch threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fused(operator: str) -> list[Any]:
    """The fused implementations of an operator, as parameters for ``pytest.mark.parametrize``.

    One that cannot run on this machine is skipped and the report says why.
    """
    return [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                (reason := backends.reason_here(operator, name)) is not None,
                reason=f"{operator}: {name}: {reason}",
            ),
        )
        for name in backends.fused_implementations(operator)
    ]


def device_of(implementation: str) -> str:
    """The device type on which an implementation is tested on this machine."""
    return "cpu" if implementation == "reference" else backends.device_of(implementation)


def random(
    *shape: int, seed: int, dtype: torch.dtype = torch.float64, grad: bool = False
) -> Tensor:
    """Normal figures from a seed, rounded to ``dtype``; the same for every dtype but for that."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return values.requires_grad_(grad)


def in_float64(tensor: Tensor, *, grad: bool = True) -> Tensor:
    """A float64 leaf with the values of ``tensor``, for the reference to be asked."""
    return tensor.detach().cpu().double().requires_grad_(grad)


def grid_sample_has_double_backward() -> bool:
    """Newer versions of PyTorch differentiate grid_sample twice, 2.11 does not."""
    image, grid = torch.rand(1, 1, 2, 2, requires_grad=True), torch.rand(1, 2, 2, 2)
    sampled = torch.nn.functional.grid_sample(image, grid, align_corners=True)
    (gradient,) = torch.autograd.grad(sampled.square().sum(), image, create_graph=True)
    try:
        gradient.sum().backward()
    except RuntimeError:
        return False
    return True
