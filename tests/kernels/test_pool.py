"""Masked part pooling: every implementation that can run here against the float64 reference."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support import (
    assert_close_to_reference,
    bitwise_equal,
    device_of,
    fused,
    in_float64,
    poisoned_memory,
    random,
    strided,
    threads,
)
from torch import Tensor

import gsalign_kernels as kernels
from gsalign_kernels import backends, registration
from gsalign_kernels.pool import ACTIVATIONS, MODES, VISIBILITIES
from gsalign_kernels.triton import launch

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
CASES = list(itertools.product(MODES, ACTIVATIONS))
ALL = ["reference", *fused("masked_part_pool")]
NAMES = ("pooled", "visibility", "d tokens", "d masks")

# (B, P, N, C, prefix): every length that meets an end of a group of rows or a chunk of channels.
SIZES = (
    (3, 6, 128, 48, 1),
    (1, 1, 128, 769, 0),
    (3, 33, 7, 7, 2),
    (2, 2, 1, 1, 0),
    (1, 8, 9, 257, 1),
    (2, 9, 31, 16, 0),
    (2, 2, 17, 1030, 1),
)


# What is left of them where every instruction is interpreted: ends of tiles of all kinds.
INTERPRETED_SIZES = ((2, 6, 40, 48, 1), (2, 2, 1, 1, 0), (1, 8, 9, 257, 1), (2, 9, 31, 16, 0))


def interpreted(implementation: str) -> bool:
    return implementation == "triton" and launch.interpreted()


def takes(implementation, dtype):
    """Whether an implementation takes tokens of this type."""
    device = device_of(implementation)
    return not backends.reason_against("masked_part_pool", implementation, device, dtype)


def skip_unless_served(implementation: str, dtype: torch.dtype) -> None:
    if not takes(implementation, dtype):
        pytest.skip("float64 is left to cpp and the reference")


def dtype_of_masks(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def inputs(size, *, dtype, shared=False, activation=None, background=False, seed=0, device="cpu"):
    """Tokens, masks and upstream gradients of both results.

    Weights are not negative, the first of several parts hides everything where masks are weights.
    """
    batch, parts, positions, channels, prefix = size
    tokens = random(batch, prefix + positions, channels, seed=seed, dtype=dtype)
    lengths = (parts + background, positions)
    lengths = lengths if shared else (batch, *lengths)
    masks = random(*lengths, seed=seed + 1, dtype=dtype_of_masks(dtype))
    if activation is None:
        masks = masks.abs()
        if parts > 1:
            masks[..., int(background), :] = 0.0
    upstream = random(batch, parts, channels, seed=seed + 2, dtype=dtype)
    seen = random(batch, parts, seed=seed + 3, dtype=dtype_of_masks(dtype))
    return tuple(t.to(device) for t in (tokens, masks, upstream, seen))


def run(implementation, tokens, masks, upstream, seen, **options):
    """Both results and both gradients."""
    tokens, masks = (t.detach().requires_grad_() for t in (tokens, masks))
    results = kernels.masked_part_pool(tokens, masks, implementation=implementation, **options)
    count = 1 + results[1].requires_grad  # binary visibilities have no gradient
    grads = torch.autograd.grad(results[:count], (tokens, masks), (upstream, seen)[:count])
    return *results, *grads


def assert_all_close(actual, expected, dtype):
    for name, ours, theirs in zip(NAMES, actual, expected, strict=True):
        kind = dtype if name in ("pooled", "d tokens") else dtype_of_masks(dtype)
        assert_close_to_reference(ours, theirs, kind, name=name)


def in_reference(arguments, **options):
    return run("reference", *(in_float64(t) for t in arguments), **options)


@pytest.mark.parametrize("implementation", fused("masked_part_pool"))
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("mode", "activation"), CASES)
def test_agrees_with_the_reference(implementation, mode, activation, dtype, shared):
    skip_unless_served(implementation, dtype)
    sizes = SIZES
    if interpreted(implementation):  # half types differ in how they are read and written only
        sizes = INTERPRETED_SIZES if dtype == torch.float32 else INTERPRETED_SIZES[1:2]
    for seed, size in enumerate(sizes):
        arguments = inputs(
            size,
            dtype=dtype,
            shared=shared,
            activation=activation,
            seed=10 * seed,
            device=device_of(implementation),
        )
        options = {"prefix": size[-1], "mode": mode, "activation": activation}
        with poisoned_memory():
            actual = run(implementation, *arguments, **options)
        assert_all_close(actual, in_reference(arguments, **options), dtype)


@pytest.mark.parametrize("implementation", fused("masked_part_pool"))
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(("mode", "activation"), CASES)
def test_background_and_both_visibilities_agree_with_the_reference(
    implementation, mode, activation, background, shared
):
    many = 9 if interpreted(implementation) else 32
    for seed, size in enumerate(((3, 6, 40, 24, 1), (1, many, 7, 65, 0), (2, 1, 2, 3, 1))):
        arguments = inputs(
            size,
            dtype=torch.float32,
            shared=shared,
            activation=activation,
            background=background,
            seed=10 * seed,
            device=device_of(implementation),
        )
        for visibility in VISIBILITIES:
            options = {
                "prefix": size[-1],
                "mode": mode,
                "activation": activation,
                "background": background,
                "visibility": visibility,
            }
            with poisoned_memory():
                actual = run(implementation, *arguments, **options)
            assert_all_close(actual, in_reference(arguments, **options), torch.float32)


@pytest.mark.parametrize("implementation", ALL)
def test_binary_visibility_is_who_leads_somewhere(implementation):
    device = device_of(implementation)
    tokens = torch.ones(1, 4, 2, device=device)
    # Positions: a tie, which the first channel has; two leaders; all zero, which nobody has.
    weights = [[0.5, 0.1, 0.0, 0.2], [0.5, 0.3, 0.0, 0.1], [0.2, 0.2, 0.0, 0.9], [0.0] * 4]
    masks = torch.tensor(weights, device=device)

    def seen(masks, **options):
        return kernels.masked_part_pool(
            tokens, masks, visibility="binary", implementation=implementation, **options
        )[1].tolist()

    assert seen(masks) == [[1.0, 1.0, 1.0, 0.0]]
    assert seen(masks, background=True) == [[1.0, 1.0, 0.0]]
    assert seen(masks[[3, 2]], background=True) == [[1.0]]
    assert seen(masks[[2, 3]], background=True) == [[0.0]]
    assert seen(masks[3:]) == [[0.0]]
    assert seen(torch.full_like(masks, math.nan)) == [[0.0] * 4]
    assert seen(masks[:1], background=True) == [[]]


@pytest.mark.parametrize("implementation", ALL)
def test_binary_visibility_has_no_gradient(implementation):
    tokens, masks, *_ = inputs(
        (2, 3, 6, 4, 0), dtype=torch.float32, device=device_of(implementation)
    )
    _, seen = kernels.masked_part_pool(
        tokens, masks.requires_grad_(), visibility="binary", implementation=implementation
    )
    assert not seen.requires_grad


def test_stripe_edges_round_and_may_be_empty():
    def rows(height, parts):
        masks = kernels.stripe_masks((height, 2), parts)
        assert masks.shape == (parts, height * 2) and masks.dtype == torch.float32
        assert torch.equal(masks.sum(dim=0), torch.ones(height * 2))
        return masks.reshape(parts, height, 2).sum(dim=(1, 2)).div(2).int().tolist()

    assert rows(16, 6) == [3, 2, 3, 3, 2, 3]
    assert rows(16, 4) == [4, 4, 4, 4]
    assert rows(5, 2) == [2, 3]
    assert rows(2, 5) == [0, 1, 0, 1, 0]
    assert kernels.stripe_masks((2, 2), 1, dtype=torch.float64).dtype == torch.float64
    with pytest.raises(ValueError, match="parts: wanted at least 1, got 0"):
        kernels.stripe_masks((2, 2), 0)
    with pytest.raises(TypeError, match="size: wanted"):
        kernels.stripe_masks(4, 2)


@pytest.mark.parametrize("implementation", fused("masked_part_pool"))
@pytest.mark.parametrize(
    ("dtype", "mode"), [(torch.float32, "mean"), (torch.float32, "max"), (torch.bfloat16, "mean")]
)
def test_results_too_large_for_caches(implementation, dtype, mode):
    """Above 16 MiB gradients are written by other instructions; rows start at odd addresses."""
    if interpreted(implementation):
        pytest.skip("takes minutes in the interpreter")
    positions = 17_000_000 // (2 * 1027 * dtype.itemsize)
    size = (2, 1, positions, 1027, 1)
    arguments = inputs(size, dtype=dtype, device=device_of(implementation))
    with poisoned_memory():
        actual = run(implementation, *arguments, prefix=1, mode=mode)
    assert actual[2].nbytes > 1 << 24
    assert_all_close(actual, in_reference(arguments, prefix=1, mode=mode), dtype)


@pytest.mark.parametrize("implementation", fused("masked_part_pool"))
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("mode", "activation"), CASES)
def test_empty_lengths(implementation, mode, activation, shared):
    for empty in range(4):
        size = [2, 3, 5, 4, 1]
        size[empty] = 0
        arguments = inputs(size, dtype=torch.float32, shared=shared, activation=activation)
        arguments = [t.to(device_of(implementation)) for t in arguments]
        options = {"prefix": 1, "mode": mode, "activation": activation}
        with poisoned_memory():
            actual = run(implementation, *arguments, **options)
        assert_all_close(actual, in_reference(arguments, **options), torch.float32)


def scalar_pool(tokens: Tensor, masks: Tensor, prefix, mode, activation, background, eps):
    """The documented formulas, element by element in Python's own arithmetic."""
    batch, count, channels = tokens.shape
    channels_of_masks = masks.shape[-2]
    parts = channels_of_masks - background
    positions = count - prefix
    pooled = torch.zeros(batch, parts, channels, dtype=torch.float64)
    visibility = torch.zeros(batch, parts, dtype=torch.float64)
    for b in range(batch):
        logits = (masks if masks.dim() == 2 else masks[b]).tolist()
        weights = [row[:] for row in logits]
        for n in range(positions):
            for p in range(channels_of_masks):
                if activation == "sigmoid":
                    weights[p][n] = 1.0 / (1.0 + math.exp(-logits[p][n]))
                elif activation == "softmax":
                    total = sum(math.exp(logits[q][n]) for q in range(channels_of_masks))
                    weights[p][n] = math.exp(logits[p][n]) / total
        weights = weights[background:]
        for p in range(parts):
            visibility[b, p] = max(weights[p])
            for c in range(channels):
                values = [weights[p][n] * float(tokens[b, prefix + n, c]) for n in range(positions)]
                if mode == "max":
                    pooled[b, p, c] = max(values)
                elif mode == "mean":
                    pooled[b, p, c] = math.fsum(values) / positions
                else:
                    pooled[b, p, c] = math.fsum(values) / max(math.fsum(weights[p]), eps)
    return pooled, visibility


@pytest.mark.parametrize(
    "implementation",
    ["reference", *(p for p in fused("masked_part_pool") if p.values[0] == "cpp")],
)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("mode", "activation"), CASES)
def test_agrees_with_scalar_arithmetic(implementation, mode, activation, shared):
    # Shared masks go with a background here, to halve the cases.
    tokens, masks, *_ = inputs(
        (2, 3, 11, 5, 1),
        dtype=torch.float64,
        shared=shared,
        activation=activation,
        background=shared,
    )
    actual = kernels.masked_part_pool(
        tokens,
        masks,
        prefix=1,
        mode=mode,
        activation=activation,
        background=shared,
        implementation=implementation,
    )
    expected = scalar_pool(tokens, masks, 1, mode, activation, shared, 1e-6)
    assert_close_to_reference(actual[0], expected[0], torch.float64, name="pooled")
    assert_close_to_reference(actual[1], expected[1], torch.float64, name="visibility")


@pytest.mark.parametrize("implementation", ALL)
def test_stripes_are_adaptive_pooling(implementation):
    height, width, parts = 12, 5, 4
    device = device_of(implementation)
    image = random(3, 20, height, width, seed=4, dtype=torch.float32).abs().to(device)
    tokens = image.flatten(2).transpose(1, 2)
    stripes = kernels.stripe_masks((height, width), parts, device=device)
    for mode, pool in (
        ("weighted_mean", torch.nn.functional.adaptive_avg_pool2d),
        ("max", torch.nn.functional.adaptive_max_pool2d),
    ):
        pooled, visibility = kernels.masked_part_pool(
            tokens, stripes, mode=mode, implementation=implementation
        )
        expected = pool(image.double(), (parts, 1)).squeeze(-1).transpose(1, 2)
        assert_close_to_reference(pooled, expected, torch.float32, name=mode)
        assert torch.equal(visibility, torch.ones(3, parts, device=device))


@pytest.mark.parametrize("implementation", ALL)
def test_one_uniform_part_is_the_plain_mean(implementation):
    tokens = random(4, 33, 70, seed=0, dtype=torch.float32).to(device_of(implementation))
    ones = torch.ones(1, 32, device=tokens.device)
    for mode in ("weighted_mean", "mean"):
        pooled, _ = kernels.masked_part_pool(
            tokens, ones, prefix=1, mode=mode, implementation=implementation
        )
        expected = tokens[:, 1:].double().mean(dim=1, keepdim=True)
        assert_close_to_reference(pooled, expected, torch.float32)


@pytest.mark.parametrize("implementation", ALL)
def test_an_invisible_part_gives_zeros_and_no_division_by_zero(implementation):
    tokens, _, upstream, seen = inputs(
        (2, 3, 6, 4, 0), dtype=torch.float32, device=device_of(implementation)
    )
    masks = torch.zeros(2, 3, 6, device=tokens.device)
    pooled, visibility, grad_tokens, grad_masks = run(
        implementation, tokens, masks, upstream, seen, eps=0.5
    )
    assert not pooled.any() and not visibility.any() and not grad_tokens.any()
    # Below eps the divisor is a constant: the gradient is sum_c g x / eps, and no more.
    expected = torch.einsum("bpc,bnc->bpn", upstream.double(), tokens.double()) / 0.5
    expected[:, :, 0] += seen.double()
    assert_close_to_reference(grad_masks, expected, torch.float32)


@pytest.mark.parametrize("implementation", fused("masked_part_pool"))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_eps_on_both_sides_of_the_sums(implementation, activation):
    dtype = torch.float64 if takes(implementation, torch.float64) else torch.float32
    arguments = inputs(
        (3, 4, 20, 9, 0),
        dtype=dtype,
        activation=activation,
        device=device_of(implementation),
    )
    weights = arguments[1]
    if activation == "softmax":
        weights = weights.softmax(dim=1)
    elif activation == "sigmoid":
        weights = weights.sigmoid()
    sums = weights.sum(dim=-1).flatten().sort().values
    eps = float(sums[5:7].mean())  # half of the twelve sums lie below
    options = {"activation": activation, "eps": eps}
    actual = run(implementation, *arguments, **options)
    assert_all_close(actual, in_reference(arguments, **options), dtype)


@pytest.mark.parametrize("implementation", ALL)
def test_of_equal_weights_the_first_is_the_visible_one(implementation):
    tokens = torch.ones(1, 5, 2, device=device_of(implementation))
    masks = torch.tensor([[0.5, 0.25, 0.5, 0.5, 0.0]], device=tokens.device, requires_grad=True)
    _, visibility = kernels.masked_part_pool(tokens, masks, implementation=implementation)
    visibility.sum().backward()
    assert visibility.item() == 0.5
    assert masks.grad.tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("implementation", ALL)
def test_of_equal_maxima_the_first_gets_the_gradient(implementation):
    tokens = torch.tensor([[[1.0], [3.0], [3.0], [-3.0]]], device=device_of(implementation))
    tokens.requires_grad_()
    pooled, _ = kernels.masked_part_pool(
        tokens,
        torch.ones(1, 4, device=tokens.device),
        mode="max",
        implementation=implementation,
    )
    pooled.sum().backward()
    assert pooled.item() == 3.0
    assert tokens.grad.flatten().tolist() == [0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("implementation", ALL)
def test_of_several_nan_the_first_gets_the_gradient(implementation):
    tokens = random(1, 40, 3, seed=0, dtype=torch.float32)
    masks = torch.ones(2, 40)

    def pool():
        device = device_of(implementation)
        arguments = [t.detach().to(device).clone().requires_grad_() for t in (tokens, masks)]
        results = kernels.masked_part_pool(*arguments, mode="max", implementation=implementation)
        return arguments, *results

    tokens[0, [9, 11, 30], 1] = math.nan
    arguments, pooled, _ = pool()
    (gradient,) = torch.autograd.grad(pooled.sum(), arguments[:1])
    assert gradient[0, :, 1].nonzero().flatten().tolist() == [9]
    masks[1, [8, 12]] = math.nan
    arguments, _, seen = pool()
    (gradient,) = torch.autograd.grad(seen.sum(), arguments[1:])
    assert gradient[1].nonzero().flatten().tolist() == [8]


@pytest.mark.parametrize("implementation", ALL)
def test_a_part_masked_out_by_an_infinite_logit_is_gone(implementation):
    tokens, logits, *_ = inputs((2, 3, 9, 4, 0), dtype=torch.float32, activation="softmax")
    logits[:, 1] = -math.inf
    device = device_of(implementation)
    for activation in ("softmax", "sigmoid"):
        pooled, visibility = kernels.masked_part_pool(
            tokens.to(device),
            logits.to(device),
            activation=activation,
            implementation=implementation,
        )
        assert not visibility[:, 1].any() and not pooled[:, 1].any()
        assert pooled.isfinite().all() and visibility[:, [0, 2]].all()


@pytest.mark.parametrize("implementation", fused("masked_part_pool"))
def test_extreme_logits(implementation):
    tokens, _, upstream, seen = inputs((1, 4, 300, 3, 0), dtype=torch.float32)
    seen = torch.zeros_like(seen)  # where several weights round to 1, types differ on the first
    logits = torch.linspace(-120.0, 120.0, 1200).reshape(1, 4, 300)
    arguments = [t.to(device_of(implementation)) for t in (tokens, logits, upstream, seen)]
    for activation in ("softmax", "sigmoid"):
        options = {"activation": activation, "mode": "mean"}
        actual = run(implementation, *arguments, **options)
        assert_all_close(actual, in_reference(arguments, **options), torch.float32)


@pytest.mark.parametrize("implementation", fused("masked_part_pool"))
@pytest.mark.parametrize("mode", MODES)
def test_nan_stays_where_the_reference_has_it(implementation, mode):
    tokens, masks, upstream, seen = inputs((3, 4, 20, 6, 0), dtype=torch.float32)
    tokens[0, 13, 2] = math.nan
    masks[1, 2, 11] = math.nan
    masks[2, 3, 5] = math.inf
    tokens[2, 6, 1] = -math.inf
    arguments = [t.to(device_of(implementation)) for t in (tokens, masks, upstream, seen)]
    actual = run(implementation, *arguments, mode=mode)
    expected = run("reference", *arguments, mode=mode)
    for name, ours, theirs in zip(NAMES[:2], actual[:2], expected[:2], strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan()), name
        assert torch.equal(ours.isinf(), theirs.isinf()), name
    healthy = ~expected[2].isnan()
    assert actual[2][healthy].isfinite().all() == expected[2][healthy].isfinite().all()


@pytest.mark.parametrize("implementation", fused("masked_part_pool"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_any_strides(implementation, dtype, mode):
    for shared in (False, True):
        arguments = inputs(
            (3, 6, 20, 40, 1), dtype=dtype, shared=shared, device=device_of(implementation)
        )
        expected = run(implementation, *arguments, prefix=1, mode=mode)
        actual = run(implementation, *(strided(t) for t in arguments), prefix=1, mode=mode)
        tokens, *rest = arguments
        transposed = tokens.transpose(1, 2).contiguous().transpose(1, 2)
        wide = torch.cat([tokens, tokens], dim=2)[:, :, :40]
        for name, ours, theirs in zip(NAMES, actual, expected, strict=True):
            assert bitwise_equal(ours, theirs), name
        for view in (transposed, wide):
            actual = run(implementation, view, *rest, prefix=1, mode=mode)
            assert all(map(bitwise_equal, actual, expected))


@pytest.mark.parametrize("implementation", fused("masked_part_pool"))
def test_expanded_arguments_and_gradients(implementation):
    device = device_of(implementation)
    tokens = random(1, 8, 5, seed=0, dtype=torch.float32).expand(3, -1, -1).to(device)
    masks = random(1, 1, 8, seed=1, dtype=torch.float32).abs().expand(3, 2, -1).to(device)
    upstream = torch.ones((), device=device).expand(3, 2, 5)
    seen = torch.ones((), device=device).expand(3, 2)
    actual = run(implementation, tokens, masks, upstream, seen)
    assert_all_close(actual, in_reference((tokens, masks, upstream, seen)), torch.float32)


@pytest.mark.parametrize("implementation", fused("masked_part_pool"))
def test_one_result_or_one_argument_alone(implementation):
    tokens, masks, upstream, seen = inputs(
        (2, 3, 10, 6, 0), dtype=torch.float32, device=device_of(implementation)
    )
    _, _, both_tokens, _ = run(implementation, tokens, masks, upstream, 0 * seen)
    _, _, _, seen_masks = run(implementation, tokens, masks, 0 * upstream, seen)
    leaf = tokens.clone().requires_grad_()
    pooled, _ = kernels.masked_part_pool(leaf, masks, implementation=implementation)
    pooled.backward(upstream)
    assert bitwise_equal(leaf.grad, both_tokens)
    leaf = masks.clone().requires_grad_()
    _, visibility = kernels.masked_part_pool(tokens, leaf, implementation=implementation)
    visibility.backward(seen)
    assert bitwise_equal(leaf.grad, seen_masks)


@pytest.mark.parametrize("implementation", fused("masked_part_pool"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("mode", "activation"), CASES)
def test_every_bit_is_the_same_for_any_threads_runs_and_batches(
    implementation, dtype, mode, activation
):
    options = {"prefix": 1, "mode": mode, "activation": activation}
    for shared in (False, True):
        arguments = inputs(
            (5, 6, 40, 48 if interpreted(implementation) else 1100, 1),
            dtype=dtype,
            shared=shared,
            activation=activation,
            device=device_of(implementation),
        )
        with threads(1):
            first = run(implementation, *arguments, **options)
        for count in (2,) if interpreted(implementation) else (2, 2, 3):
            with threads(count):
                again = run(implementation, *arguments, **options)
            for name, left, right in zip(NAMES, first, again, strict=True):
                assert bitwise_equal(left, right), f"{name} with {count} threads"
    tokens, masks, upstream, seen = arguments
    alone = run(implementation, tokens[3:4], masks, upstream[3:4], seen[3:4], **options)
    for name, left, right in zip(NAMES[:3], first[:3], alone[:3], strict=True):
        assert bitwise_equal(left[3:4], right), f"{name} of a sample by itself"


@pytest.mark.parametrize("implementation", ["reference", "cpp"])
@pytest.mark.parametrize(("mode", "activation"), CASES)
def test_gradcheck(implementation, mode, activation):
    if implementation == "cpp" and fused("masked_part_pool")[0].marks[0].args[0]:
        pytest.skip("cpp cannot run here")
    for shared, eps in ((False, 1e-6), (True, 2.0)):
        tokens, masks, *_ = inputs(
            (2, 3, 5, 3, 1),
            dtype=torch.float64,
            shared=shared,
            activation=activation,
            background=shared,
        )
        if activation is None:  # equal weights would be a kink of the visibility
            masks = random(*masks.shape, seed=9).abs() + 0.1
        assert torch.autograd.gradcheck(
            lambda t, m, eps=eps, shared=shared: kernels.masked_part_pool(
                t,
                m,
                prefix=1,
                mode=mode,
                activation=activation,
                background=shared,
                eps=eps,
                implementation=implementation,
            ),
            (tokens.requires_grad_(), masks.requires_grad_()),
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
def test_the_bare_operators_on_cuda():
    """They check their arguments, follow no position out of range, and say what is too much."""
    arguments, upstream, seen = bare_arguments(mode=2)
    arguments = [a.cuda() if isinstance(a, Tensor) else a for a in arguments]
    kept = torch.ops.gsalign.masked_part_pool.default(*arguments)
    backward = torch.ops.gsalign.masked_part_pool_backward.default
    given = [upstream.cuda(), seen.cuda(), *arguments[:2], *kept[2:]]
    settings = backward_settings(arguments)
    backward(*given, *settings)
    for position in range(7):
        for wrong in (given[position][:1], given[position].short(), given[position].cpu()):
            with pytest.raises(RuntimeError):
                backward(*given[:position], wrong, *given[position + 1 :], *settings)
    for wild in (-1, 6, 2**31 - 1, -(2**31)):
        positions = (torch.full_like(t, wild) for t in given[5:])
        assert not any(grad.any() for grad in backward(*given[:5], *positions, *settings))
    with pytest.raises(RuntimeError, match="at most 512 parts"):
        torch.ops.gsalign.masked_part_pool.default(
            arguments[0], torch.zeros(513, 6, device="cuda"), *arguments[2:]
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
@pytest.mark.parametrize("mode", MODES)
def test_many_parts_and_positions_on_cuda(mode):
    """More parts than are accumulated at once, and more weights than a block's table holds."""
    for size in (
        (2, 32, 128, 768, 1),
        (1, 17, 700, 136, 0),
        (2, 3, 4100, 24, 1),
        (1, 500, 40, 9, 0),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            arguments = inputs(size, dtype=dtype, activation="softmax", device="cuda")
            options = {"prefix": size[-1], "mode": mode, "activation": "softmax"}
            with poisoned_memory():
                actual = run("cuda", *arguments, **options)
            assert_all_close(actual, in_reference(arguments, **options), dtype)


@pytest.mark.parametrize("implementation", fused("masked_part_pool"))
def test_differentiating_twice_refuses_and_names_the_reference(implementation):
    tokens, masks, *_ = inputs((1, 2, 4, 3, 0), dtype=torch.float32)
    device = device_of(implementation)
    tokens, masks = (t.to(device).requires_grad_() for t in (tokens, masks))
    pooled, _ = kernels.masked_part_pool(tokens, masks, implementation=implementation)
    (grad,) = torch.autograd.grad(pooled.square().sum(), tokens, create_graph=True)
    with pytest.raises(RuntimeError, match=r"masked_part_pool: .*implementation='reference'"):
        grad.sum().backward()


def test_the_reference_can_be_differentiated_twice():
    tokens, masks, *_ = inputs((1, 2, 4, 2, 0), dtype=torch.float64, activation="softmax")
    assert torch.autograd.gradgradcheck(
        lambda t, m: kernels.masked_part_pool(
            t, m, activation="softmax", implementation="reference"
        ),
        (tokens.requires_grad_(), masks.requires_grad_()),
    )


needs_cpp = pytest.mark.skipif(
    "cpp" not in kernels.backends.fused_implementations("masked_part_pool")
    or kernels.backends.reason_here("masked_part_pool", "cpp") is not None,
    reason="the cpp operators cannot run here",
)


def bare_arguments(mode=0, activation=0, shared=False, dtype=torch.float32, device="cpu"):
    tokens, masks, upstream, seen = inputs(
        (2, 3, 6, 5, 1),
        dtype=dtype,
        shared=shared,
        activation=ACTIVATIONS[activation],
        device=device,
    )
    return (tokens, masks, 1, mode, activation, False, 0, 1e-6), upstream, seen


def backward_settings(forward):
    """The backward operator's settings: those of the forward one without the visibility's kind."""
    *_, prefix, mode, activation, background, _, eps = forward
    return prefix, mode, activation, background, eps


def bare_operators(implementation: str):
    """The operator behind an implementation and that of its backward pass."""
    names = ("masked_part_pool", "masked_part_pool_backward")
    return tuple(registration.operator(name, implementation) for name in names)


@pytest.mark.parametrize("implementation", fused("masked_part_pool"))
@pytest.mark.parametrize(
    ("mode", "activation", "shared", "dtype"),
    [(0, 1, False, torch.float32), (1, 2, True, torch.bfloat16), (2, 0, False, torch.float64)],
)
def test_opcheck(implementation, mode, activation, shared, dtype):
    device = device_of(implementation)
    if backends.reason_against("masked_part_pool", implementation, device, dtype) is not None:
        dtype = torch.float32
    forward, upstream, seen = bare_arguments(mode, activation, shared, dtype, device)
    op, op_backward = bare_operators(implementation)
    _, _, totals, peaks, winners = op(*forward)
    tokens, masks, *rest = forward
    torch.library.opcheck(op, (tokens.requires_grad_(), masks.requires_grad_(), *rest))
    backward = (upstream, seen, tokens.detach(), masks.detach(), totals, peaks, winners)
    torch.library.opcheck(
        op_backward,
        (*backward, *backward_settings(forward)),
        test_utils=("test_schema", "test_faketensor"),
    )


def bad(**changes):
    good = {
        "tokens": torch.zeros(2, 7, 5),
        "masks": torch.zeros(2, 3, 6),
        "prefix": 1,
        "mode": "mean",
        "activation": None,
        "eps": 1e-6,
    }
    return {**good, **changes}


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"tokens": torch.zeros(7, 5)}, ValueError, r"tokens: wanted 3 dimensions.*\[7, 5\]"),
        ({"tokens": [1.0]}, TypeError, "tokens: wanted a tensor, got list"),
        ({"tokens": torch.zeros(2, 7, 5, dtype=torch.int64)}, TypeError, "tokens: .*int64"),
        ({"masks": torch.zeros(2, 3, 7)}, ValueError, r"masks: .*\[2, P, 6\].*\[2, 3, 7\]"),
        ({"masks": torch.zeros(3, 3, 6)}, ValueError, r"masks: .*\[2, P, 6\].*\[3, 3, 6\]"),
        ({"masks": torch.zeros(3, 7)}, ValueError, r"masks: .*\[P, 6\].*\[3, 7\]"),
        ({"masks": torch.zeros(6)}, ValueError, "masks: wanted 3 dimensions"),
        ({"masks": torch.zeros(2, 3, 6, dtype=torch.bool)}, TypeError, "masks: .*bool"),
        ({"masks": torch.zeros(2, 3, 6, device="meta")}, ValueError, "masks: is on meta"),
        ({"visibility": "some"}, ValueError, "visibility: .*'binary'.*'some'"),
        (
            {"background": True, "masks": torch.zeros(2, 0, 6)},
            ValueError,
            "masks: wanted a channel of background",
        ),
        ({"prefix": 8}, ValueError, "prefix: wanted 0 to 7 .*got 8"),
        ({"prefix": -1}, ValueError, "prefix: wanted 0 to 7 .*got -1"),
        ({"mode": "median"}, ValueError, "mode: .*'max'.*'median'"),
        ({"activation": "relu"}, ValueError, "activation: .*'sigmoid'.*'relu'"),
        ({"eps": 0.0}, ValueError, "eps: wanted a positive number, got 0"),
        ({"eps": math.nan}, ValueError, "eps: wanted a positive number, got nan"),
        ({"implementation": "fortran"}, ValueError, "implementation: .*cpp.*'fortran'"),
    ],
)
def test_errors_name_the_argument(implementation, changes, error, words):
    arguments = {"implementation": implementation, **bad(**changes)}
    device = device_of(implementation)
    for name in ("tokens", "masks"):
        if isinstance(arguments[name], Tensor) and arguments[name].device.type == "cpu":
            arguments[name] = arguments[name].to(device)
    with pytest.raises(error, match=words):
        kernels.masked_part_pool(arguments.pop("tokens"), arguments.pop("masks"), **arguments)


@needs_cpp
@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (0, torch.zeros(2, 7), "tokens"),
        (1, torch.zeros(2, 3, 7), "masks"),
        (1, torch.zeros(6), "masks"),
        (1, torch.zeros(2, 3, 6, dtype=torch.float64), "masks"),
        (0, torch.zeros(2, 7, 5, dtype=torch.int32), "tokens|masks"),
        (2, 8, "prefix"),
        (2, -1, "prefix"),
        (3, 3, "mode"),
        (4, -1, "activation"),
        (6, 2, "visibility"),
        (7, 0.0, "eps"),
    ],
)
def test_the_bare_operator_checks_too(position, value, words):
    arguments = list(bare_arguments()[0])
    arguments[position] = value
    with pytest.raises(RuntimeError, match=words):
        torch.ops.gsalign.masked_part_pool.default(*arguments)


@needs_cpp
def test_the_bare_backward_operator_checks_too():
    forward, upstream, seen = bare_arguments(mode=2)
    kept = torch.ops.gsalign.masked_part_pool.default(*forward)
    arguments = [upstream, seen, *forward[:2], *kept[2:], *backward_settings(forward)]
    backward = torch.ops.gsalign.masked_part_pool_backward.default
    backward(*arguments)
    for position in range(7):
        for wrong in (arguments[position][:1], arguments[position].short()):
            broken = [*arguments[:position], wrong, *arguments[position + 1 :]]
            with pytest.raises(RuntimeError):
                backward(*broken)


@pytest.mark.parametrize("implementation", fused("masked_part_pool"))
def test_positions_out_of_range_are_not_followed(implementation):
    forward, upstream, seen = bare_arguments(mode=2, device=device_of(implementation))
    op, op_backward = bare_operators(implementation)
    _, _, totals, peaks, winners = op(*forward)
    for wild in (-1, 6, 2**31 - 1, -(2**31)):
        grads = op_backward(
            upstream,
            seen,
            *forward[:2],
            totals,
            torch.full_like(peaks, wild),
            torch.full_like(winners, wild),
            *backward_settings(forward),
        )
        assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("implementation", fused("masked_part_pool"))
def test_compiles_as_one_graph_and_exports(implementation):
    device = device_of(implementation)

    class Pool(torch.nn.Module):
        def forward(self, tokens: Tensor, logits: Tensor):
            return kernels.masked_part_pool(
                tokens, logits, prefix=1, activation="softmax", implementation=implementation
            )

    compiled = torch.compile(Pool(), fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((2, 3, 6, 5, 1), (3, 4, 9, 8, 1)):
        tokens, masks, upstream, seen = inputs(
            size, dtype=torch.float32, activation="softmax", device=device
        )
        expected = run(
            implementation, tokens, masks, upstream, seen, prefix=1, activation="softmax"
        )
        tokens, masks = tokens.requires_grad_(), masks.requires_grad_()
        results = compiled(tokens, masks)
        grads = torch.autograd.grad(results, (tokens, masks), (upstream, seen))
        for name, ours, theirs in zip(NAMES, (*results, *grads), expected, strict=True):
            assert bitwise_equal(ours, theirs), name
    tokens, masks = tokens.detach(), masks.detach()
    exported = torch.export.export(Pool(), (tokens, masks)).module()
    for ours, theirs in zip(exported(tokens, masks), expected[:2], strict=True):
        assert bitwise_equal(ours, theirs)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_masks_in_float32(implementation, dtype):
    device = device_of(implementation)
    tokens, masks, upstream, seen = inputs(
        (2, 3, 10, 8, 0), dtype=dtype, activation="softmax", device=device
    )
    expected = run(implementation, tokens, masks, upstream, seen, activation="softmax")
    leaves = [t.detach().requires_grad_() for t in (tokens, masks)]
    with torch.autocast(device, dtype=dtype):
        results = kernels.masked_part_pool(
            *leaves, activation="softmax", implementation=implementation
        )
    actual = (*results, *torch.autograd.grad(results, leaves, (upstream, seen)))
    assert [t.dtype for t in actual] == [dtype, torch.float32, dtype, torch.float32]
    assert_all_close(actual, [t.double() for t in expected], dtype)


@needs_cpp
def test_autocast_lifts_half_masks_of_the_bare_operator():
    tokens, masks, *_ = inputs((2, 3, 10, 8, 0), dtype=torch.bfloat16)
    masks = masks.bfloat16()
    op = torch.ops.gsalign.masked_part_pool.default
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lifted = op(tokens, masks, 0, 0, 0, False, 0, 1e-6)
    expected = op(tokens, masks.float(), 0, 0, 0, False, 0, 1e-6)
    assert all(map(bitwise_equal, lifted, expected))


@pytest.mark.parametrize("implementation", ALL)
def test_masks_of_another_type_are_converted(implementation):
    tokens, masks, *_ = inputs(
        (2, 3, 10, 8, 0), dtype=torch.float32, device=device_of(implementation)
    )
    expected = kernels.masked_part_pool(tokens, masks, implementation=implementation)
    actual = kernels.masked_part_pool(tokens, masks.double(), implementation=implementation)
    assert all(map(bitwise_equal, actual, expected))
    leaf = masks.half().requires_grad_()
    pooled, visibility = kernels.masked_part_pool(tokens, leaf, implementation=implementation)
    (pooled.sum() + visibility.sum()).backward()
    assert leaf.grad.dtype == torch.float16 and visibility.dtype == torch.float32
