"""The shared assertions find what they are there to find."""

from __future__ import annotations

import pytest
import torch
from support import (
    TOLERANCES,
    assert_close_to_reference,
    bitwise_equal,
    in_float64,
    poisoned_memory,
    random,
    strided,
    threads,
)

DTYPES = tuple(TOLERANCES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_correctly_rounded_result_passes(dtype):
    expected = random(50, 40, seed=0)
    assert_close_to_reference(expected.to(dtype), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_small_error_everywhere_fails(dtype):
    expected = random(50, 40, seed=0)
    wrong = (expected * (1.0 + 4.0 * TOLERANCES[dtype][0])).to(dtype)
    with pytest.raises(AssertionError, match="in the norm"):
        assert_close_to_reference(wrong, expected, dtype)
    assert_close_to_reference(wrong, expected, dtype, slack=10.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_single_wrong_element_fails(dtype):
    expected = random(80, 70, seed=0).clamp(-1.0, 1.0)
    wrong = expected.clone()
    wrong[34, 56] += 3.0 * TOLERANCES[dtype][1]
    with pytest.raises(AssertionError, match=r"\(34, 56\)"):
        assert_close_to_reference(wrong.to(dtype), expected.to(dtype).double(), dtype)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_element_fails(bad):
    expected = random(5, 4, seed=0)
    wrong = expected.clone()
    wrong[4, 3] = bad
    with pytest.raises(AssertionError, match="1 of 20"):
        assert_close_to_reference(wrong, expected, torch.float64)
    with pytest.raises(AssertionError, match="expected figures"):
        assert_close_to_reference(expected, wrong, torch.float64)


def test_shape_type_and_kind_are_checked():
    expected = random(5, 1, seed=0)
    with pytest.raises(AssertionError, match="shape"):
        assert_close_to_reference(expected.expand(5, 4), expected, torch.float64)
    with pytest.raises(AssertionError, match="type"):
        assert_close_to_reference(expected.float(), expected, torch.float64)
    with pytest.raises(AssertionError, match="not a tensor"):
        assert_close_to_reference(None, expected, torch.float64)
    with pytest.raises(AssertionError, match="must be float64"):
        assert_close_to_reference(expected.float(), expected.float(), torch.float32)


def test_zeros_must_be_zeros():
    zeros = torch.zeros(3, dtype=torch.float64)
    assert_close_to_reference(zeros, zeros, torch.float64)
    with pytest.raises(AssertionError, match="wanted zeros"):
        assert_close_to_reference(zeros + 1e-300, zeros, torch.float64)


def test_an_empty_result_passes():
    assert_close_to_reference(torch.zeros(0, 3), torch.zeros(0, 3).double(), torch.float32)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64])
def test_bitwise_equal(dtype):
    values = torch.tensor([1.0, 0.0, 3.0]).to(dtype)
    assert bitwise_equal(values, values.clone())
    assert not bitwise_equal(values, values[:2])
    other = values.clone()
    other.view(torch.uint8)[0] ^= 1
    assert not bitwise_equal(values, other)


def test_bitwise_equal_tells_signs_of_zero_and_types_apart_but_not_nans():
    zero = torch.tensor([0.0])
    assert not bitwise_equal(zero, -zero)
    assert not bitwise_equal(zero, zero.double())
    assert bitwise_equal(zero / 0, zero / 0)


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4), (1, 1), (0, 3), (2, 0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_strided_keeps_the_values_and_no_contiguity(shape, dtype):
    tensor = (10 * random(*shape, seed=1)).to(dtype)
    view = strided(tensor)
    assert torch.equal(view, tensor)
    assert view.dtype == dtype
    assert view.storage_offset() > 0 or view.numel() == 0
    if tensor.numel() > 1:
        assert not view.is_contiguous()
        assert all(stride != 1 for stride in view.stride())


def test_strided_gives_a_leaf():
    view = strided(random(3, 4, seed=0, grad=True))
    view.square().sum().backward()
    assert view.is_leaf
    assert torch.equal(view.grad, 2 * view)


def test_poisoned_memory_fills_and_restores():
    before = torch.are_deterministic_algorithms_enabled()
    with poisoned_memory():
        assert torch.empty(3, 4).isnan().all()
        assert torch.ones(2).new_empty(5, dtype=torch.bfloat16).isnan().all()
        assert (torch.empty(3, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
    assert torch.are_deterministic_algorithms_enabled() == before


def test_threads_restores():
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_random_is_reproducible_and_float64_leaves_are_leaves():
    figures = random(4, 5, seed=7, dtype=torch.float16, grad=True)
    assert figures.is_leaf and figures.requires_grad
    assert torch.equal(figures, random(4, 5, seed=7).half())
    assert not torch.equal(figures, random(4, 5, seed=8).half())
    leaf = in_float64(figures)
    assert leaf.is_leaf and leaf.requires_grad and leaf.dtype == torch.float64
    assert torch.equal(leaf, figures.double())
