"""Token warp: every implementation that can run here against the float64 reference."""

from __future__ import annotations

import math

import pytest
import torch
from support import (
    assert_close_to_reference,
    bitwise_equal,
    device_of,
    fused,
    grid_sample_has_double_backward,
    in_float64,
    poisoned_memory,
    random,
    strided,
    threads,
)

import gsalign_kernels as kernels

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def control_points(side: int) -> torch.Tensor:
    """A regular lattice, column-major as GSAlign stores it."""
    axis = torch.linspace(-1, 1, side, dtype=torch.float64)
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)


def inputs(batch, size, channels, prefix, *, dtype, side=2, seed=0, device="cpu"):
    """Tokens, moved source points, angles, basis, upstream gradient; no coordinate on a kink."""
    coordinates = torch.float64 if dtype == torch.float64 else torch.float32
    count = prefix + size[0] * size[1]
    tokens = random(batch, count, channels, seed=seed, dtype=dtype)
    points = control_points(side)
    source = points * 0.93 + 0.11 * random(side * side, 2, seed=seed + 1)
    angle = random(batch, seed=seed + 2)
    basis = kernels.tps_basis(points, size)
    upstream = random(batch, count, channels, seed=seed + 3, dtype=dtype)
    lifted = [t.to(coordinates).to(device) for t in (source, angle, basis)]
    return tokens.to(device), *lifted, upstream.to(device)


def run(implementation, tokens, source, angle, basis, upstream, size, prefix, eta=0.3):
    leaves = [tokens, source, angle]
    leaves = [t if t.requires_grad else t.detach().requires_grad_() for t in leaves]
    out = kernels.warp_tokens(
        *leaves, basis, size=size, eta=eta, prefix=prefix, implementation=implementation
    )
    return out, *torch.autograd.grad(out, leaves, upstream)


NAMES = ("warped", "d tokens", "d source_points", "d angle")


@pytest.mark.parametrize("implementation", fused("warp_tokens"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "size", "channels", "prefix", "side"),
    [
        (3, (16, 8), 64, 2, 2),
        (2, (5, 3), 7, 0, 3),
        (1, (1, 9), 1, 1, 2),
        (2, (9, 1), 48, 2, 2),
        (1, (1, 1), 5, 0, 2),
        (2, (4, 6), 769, 3, 4),
    ],
)
def test_agrees_with_float64(implementation, dtype, batch, size, channels, prefix, side):
    given = inputs(
        batch, size, channels, prefix, dtype=dtype, side=side, device=device_of(implementation)
    )
    with poisoned_memory():
        actual = run(implementation, *given, size, prefix)
    expected = run("reference", *(in_float64(t, grad=False) for t in given), size, prefix)
    types = (dtype, dtype, torch.float32, torch.float32)
    for name, one, other, wanted in zip(NAMES, actual, expected, types, strict=True):
        # The coordinate gradients are sums over channels and positions that partly cancel.
        assert_close_to_reference(
            one, other.detach(), wanted, slack=20 if name in NAMES[2:] else 2, name=name
        )


def test_float64_on_the_cpu():
    given = inputs(2, (6, 5), 30, 1, dtype=torch.float64, side=3)
    actual = run("cpp", *given, (6, 5), 1)
    expected = run("reference", *given, (6, 5), 1)
    for name, one, other in zip(NAMES, actual, expected, strict=True):
        assert_close_to_reference(one, other.detach(), torch.float64, slack=10, name=name)


def test_scalar_arithmetic_agrees():
    """Bilinear reading spelled out in Python, one number at a time."""
    height, width, channels, eta = 4, 3, 2, 0.7
    tokens, source, angle, basis, _ = inputs(2, (height, width), channels, 1, dtype=torch.float64)
    got = kernels.warp_tokens(tokens, source, angle, basis, size=(height, width), eta=eta, prefix=1)
    assert bitwise_equal(got[:, :1], tokens[:, :1])
    for b in range(2):
        cosine, sine = math.cos(angle[b]), math.sin(angle[b])
        for q in range(height * width):
            x0, y0 = (float(v) for v in basis[q] @ source)
            x, y = x0 * cosine - y0 * sine, x0 * sine + y0 * cosine
            px = min(max((x + 1) / 2 * (width - 1), 0), width - 1)
            py = min(max((y + 1) / 2 * (height - 1), 0), height - 1)
            for c in range(channels):
                value = 0.0
                for row in range(height):
                    for column in range(width):
                        weight = max(0, 1 - abs(px - column)) * max(0, 1 - abs(py - row))
                        value += weight * float(tokens[b, 1 + row * width + column, c])
                wanted = float(tokens[b, 1 + q, c]) + eta * value
                assert float(got[b, 1 + q, c]) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("implementation", ["reference", "cpp"])
def test_gradcheck(implementation):
    tokens, source, angle, basis, _ = inputs(2, (3, 4), 3, 1, dtype=torch.float64)

    def function(tokens, source, angle):
        return kernels.warp_tokens(
            tokens, source, angle, basis, size=(3, 4), eta=0.5, prefix=1,
            implementation=implementation,
        )  # fmt: skip

    leaves = [t.requires_grad_() for t in (tokens, source, angle)]
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.skipif(
    not grid_sample_has_double_backward(), reason="this PyTorch differentiates grid_sample once"
)
def test_reference_has_double_backward():
    tokens, source, angle, basis, _ = inputs(1, (2, 3), 2, 0, dtype=torch.float64)
    tokens.requires_grad_()

    def function(tokens):
        return kernels.warp_tokens(
            tokens, source, angle, basis, size=(2, 3), eta=0.5, implementation="reference"
        ).square()

    assert torch.autograd.gradgradcheck(function, (tokens,))


@pytest.mark.parametrize("implementation", fused("warp_tokens"))
def test_double_backward_names_the_way_out(implementation):
    given = inputs(1, (2, 3), 2, 0, dtype=torch.float32, device=device_of(implementation))
    tokens = given[0].requires_grad_()
    out = kernels.warp_tokens(
        tokens, *given[1:4], size=(2, 3), eta=0.5, implementation=implementation
    )
    (gradient,) = torch.autograd.grad(out.square().sum(), tokens, create_graph=True)
    with pytest.raises(RuntimeError, match="implementation='reference'"):
        gradient.sum().backward()


@pytest.mark.parametrize("implementation", fused("warp_tokens"))
def test_identity_is_exact(implementation):
    """Unmoved source points and no rotation: every token read at its own place."""
    size = (16, 8)
    device = device_of(implementation)
    tokens, _, _, basis, _ = inputs(2, size, 32, 2, dtype=torch.float32, device=device)
    points = control_points(2).float().to(device)
    out = kernels.warp_tokens(
        tokens, points, torch.zeros(2, device=device), basis, size=size, eta=0.25, prefix=2,
        implementation=implementation,
    )  # fmt: skip
    assert (out[:, 2:] - 1.25 * tokens[:, 2:]).abs().max() < 1e-5
    assert bitwise_equal(out[:, :2], tokens[:, :2])


@pytest.mark.parametrize("implementation", fused("warp_tokens"))
def test_all_queries_clamped_into_one_token(implementation):
    """The worst case of the transposed gather: every gradient goes to the last token."""
    size, device = (16, 8), device_of(implementation)
    tokens, source, _, basis, upstream = inputs(2, size, 48, 1, dtype=torch.float32, device=device)
    source = torch.full_like(source, 9.0)
    angle = torch.zeros(2, device=device)
    actual = run(implementation, tokens, source, angle, basis, upstream, size, 1)
    wanted = tokens.clone()
    wanted[:, 1:] += 0.3 * tokens[:, -1:]
    assert_close_to_reference(actual[0], wanted.double(), torch.float32)
    gradient = upstream.double()
    gradient[:, -1] += 0.3 * upstream[:, 1:].double().sum(1)
    assert_close_to_reference(actual[1], gradient, torch.float32, slack=3)
    assert actual[2].abs().max() == 0 and actual[3].abs().max() == 0


@pytest.mark.parametrize("implementation", fused("warp_tokens"))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, -3e38])
def test_wild_angles_and_points_read_inside(implementation, value):
    size, device = (4, 3), device_of(implementation)
    tokens, source, angle, basis, upstream = inputs(
        3, size, 9, 1, dtype=torch.float32, device=device
    )
    source[1, 0] = value
    actual = run(implementation, tokens, source, angle, basis, upstream, size, 1)
    expected = kernels.warp_tokens(
        tokens, source, angle, basis, size=size, eta=0.3, prefix=1, implementation="reference"
    )
    torch.testing.assert_close(actual[0], expected, rtol=1e-5, atol=1e-5)
    assert actual[0].isfinite().all() and actual[1].isfinite().all()


@pytest.mark.parametrize("implementation", fused("warp_tokens"))
def test_infinite_tokens_outside_the_reading_leave_no_nan(implementation):
    """A clamped read weighs its neighbour with 0; 0 times infinity must not get in."""
    size, device = (1, 4), device_of(implementation)
    basis = kernels.tps_basis(control_points(2), size).float().to(device)
    tokens = torch.zeros(1, 4, 8, device=device)
    tokens[0, 3] = math.inf
    points = control_points(2).float().to(device) * 0.2
    out = kernels.warp_tokens(
        tokens, points, torch.zeros(1, device=device), basis, size=size, eta=0.5,
        implementation=implementation,
    )  # fmt: skip
    assert out[0, :3].isfinite().all()


@pytest.mark.parametrize("implementation", fused("warp_tokens"))
def test_strides_and_empty_batches(implementation):
    size, device = (4, 3), device_of(implementation)
    given = inputs(2, size, 10, 2, dtype=torch.float32, device=device)
    plain = run(implementation, *given, size, 2)
    odd = run(implementation, *(strided(t) for t in given), size, 2)
    for one, other in zip(plain, odd, strict=True):
        assert bitwise_equal(one, other)
    nothing = [given[0][:0], given[1], given[2][:0], given[3], given[4][:0]]
    out, grad_tokens, grad_source, grad_angle = run(implementation, *nothing, size, 2)
    assert out.shape == (0, 14, 10) and grad_tokens.shape == (0, 14, 10)
    assert grad_source.abs().max() == 0 and grad_angle.shape == (0,)


@pytest.mark.parametrize("implementation", fused("warp_tokens"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_from_run_to_run_and_for_any_number_of_threads(implementation, dtype):
    size = (8, 4)
    given = inputs(3, size, 520, 1, dtype=dtype, device=device_of(implementation))
    with threads(1):
        alone = run(implementation, *given, size, 1)
    with threads(3):
        for _ in range(2):
            for one, other in zip(alone, run(implementation, *given, size, 1), strict=True):
                assert bitwise_equal(one, other)


@pytest.mark.parametrize("namespace", ["gsalign", "gsalign_triton"])
def test_opcheck(namespace):
    if namespace == "gsalign_triton" and not fused_runs("triton"):
        pytest.skip("triton needs a CUDA device, or TRITON_INTERPRET=1")
    device = device_of("triton" if namespace == "gsalign_triton" else "cpp")
    given = inputs(2, (3, 4), 16, 1, dtype=torch.float32, device=device)
    leaves = [t.detach().requires_grad_() for t in given[:3]]
    operators = getattr(torch.ops, namespace)
    settings = (3, 4, 0.3, 1)
    torch.library.opcheck(operators.warp_tokens.default, (*leaves, given[3], *settings))
    torch.library.opcheck(operators.warp_tokens_backward.default, (given[4], *given[:4], *settings))


def fused_runs(implementation: str) -> bool:
    parameters = {p.values[0]: p.marks[0].args[0] for p in fused("warp_tokens")}
    return not parameters[implementation]


@pytest.mark.parametrize(
    "implementation", [p for p in fused("warp_tokens") if p.values[0] != "triton"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_eager(implementation, dtype):
    size = (4, 3)
    given = inputs(2, size, 24, 1, dtype=dtype, device=device_of(implementation))

    def function(tokens, source, angle):
        warped = kernels.warp_tokens(
            tokens.sin(), source, angle.tanh(), given[3], size=size, eta=0.3, prefix=1,
            implementation=implementation,
        )  # fmt: skip
        return warped.cos().float().sum()

    def evaluate(function):
        leaves = [t.detach().clone().requires_grad_() for t in given[:3]]
        result = function(*leaves)
        return result, *torch.autograd.grad(result, leaves)

    loose = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    compiled = evaluate(torch.compile(function, fullgraph=True))
    for one, other in zip(compiled, evaluate(function), strict=True):
        torch.testing.assert_close(one, other, **loose)


def test_compiled_with_symbolic_shapes():
    """A last, smaller batch makes PyTorch compile again with the batch as a symbol."""

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def function(tokens, source, angle, basis):
        return kernels.warp_tokens(tokens, source, angle, basis, size=(4, 3), eta=0.3, prefix=1)

    for batch in (4, 3):
        given = inputs(batch, (4, 3), 24, 1, dtype=torch.float32)[:4]
        wanted = kernels.warp_tokens(*given, size=(4, 3), eta=0.3, prefix=1)
        assert bitwise_equal(function(*given), wanted)


def test_reference_computes_coordinates_in_float32_under_autocast():
    given = inputs(2, (4, 3), 24, 1, dtype=torch.float32)[:4]
    settings = {"size": (4, 3), "eta": 0.3, "prefix": 1, "implementation": "reference"}
    with torch.autocast("cpu", torch.bfloat16):
        inside = kernels.warp_tokens(*given, **settings)
    assert bitwise_equal(inside, kernels.warp_tokens(*given, **settings))


def test_export_keeps_the_operator():
    given = inputs(2, (4, 3), 24, 1, dtype=torch.float32)

    class Warp(torch.nn.Module):
        def forward(self, tokens, source, angle, basis):
            return kernels.warp_tokens(tokens, source, angle, basis, size=(4, 3), eta=0.3, prefix=1)

    exported = torch.export.export(Warp(), given[:4])
    assert any("warp_tokens" in str(node.target) for node in exported.graph.nodes)
    assert bitwise_equal(exported.module()(*given[:4]), Warp()(*given[:4]))


def test_autocast_keeps_features_and_lifts_coordinates():
    tokens, source, angle, basis, _ = inputs(2, (4, 3), 24, 1, dtype=torch.bfloat16)
    settings = (4, 3, 0.3, 1)
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.ops.gsalign.warp_tokens(tokens, source, angle.bfloat16(), basis, *settings)
        public = kernels.warp_tokens(
            tokens, source, angle.bfloat16(), basis, size=(4, 3), eta=0.3, prefix=1
        )
    assert out.dtype == torch.bfloat16
    wanted = torch.ops.gsalign.warp_tokens(
        tokens, source, angle.bfloat16().float(), basis, *settings
    )
    assert bitwise_equal(out, wanted) and bitwise_equal(public, wanted)


def test_half_coordinates_get_half_gradients():
    tokens, source, angle, basis, upstream = inputs(2, (4, 3), 24, 1, dtype=torch.bfloat16)
    results = run(None, tokens, source.half(), angle.bfloat16(), basis, upstream, (4, 3), 1)
    assert results[2].dtype == torch.float16 and results[3].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tokens": "x"}, TypeError, "tokens: wanted a tensor, got str"),
        ({"tokens": torch.zeros(2, 12)}, ValueError, "tokens: wanted 3 dimensions"),
        ({"tokens": torch.zeros(2, 14, 4)}, ValueError, r"prefix \+ H\*W = 1 \+ 4\*3 = 13"),
        ({"tokens": torch.zeros(2, 13, 4, dtype=torch.int32)}, TypeError, "tokens: wanted float32"),
        ({"source_points": torch.zeros(4, 3)}, ValueError, r"source_points: wanted shape \[K, 2\]"),
        ({"angle": torch.zeros(3)}, ValueError, r"angle: wanted shape \[2\], got \[3\]"),
        ({"basis": torch.zeros(12, 5)}, ValueError, r"basis: wanted shape \[12, 4\]"),
        ({"basis": torch.zeros(12, 4, requires_grad=True)}, ValueError, "basis: is a constant"),
        ({"prefix": -1}, ValueError, "prefix: wanted a number of at least 0"),
        ({"eta": math.nan}, ValueError, "eta: wanted a finite number"),
        ({"size": (4, 3, 1)}, TypeError, "size: wanted"),
        ({"angle": torch.zeros(2, device="meta")}, ValueError, "angle: is on meta"),
        ({"implementation": "cudnn"}, ValueError, "implementation: wanted one of auto, reference"),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    arguments = {
        "tokens": torch.zeros(2, 13, 4),
        "source_points": torch.zeros(4, 2),
        "angle": torch.zeros(2),
        "basis": torch.zeros(12, 4),
        "size": (4, 3),
        "eta": 0.1,
        "prefix": 1,
    }
    with pytest.raises(error, match=message):
        kernels.warp_tokens(**{**arguments, **changes})


def test_raw_operator_refuses_what_would_read_out_of_bounds():
    good = [torch.zeros(2, 13, 4), torch.zeros(4, 2), torch.zeros(2), torch.zeros(12, 4)]
    for position, bad in [(0, torch.zeros(2, 12, 4)), (2, torch.zeros(1)), (3, torch.zeros(11, 4))]:
        arguments = list(good)
        arguments[position] = bad
        with pytest.raises(RuntimeError, match="wanted shape"):
            torch.ops.gsalign.warp_tokens(*arguments, 4, 3, 0.1, 1)
    with pytest.raises(RuntimeError, match="size"):
        torch.ops.gsalign.warp_tokens(*good, -4, -3, 0.1, 1)


@pytest.mark.parametrize("implementation", ["reference", *fused("warp_tokens")])
@pytest.mark.parametrize(
    ("x", "y"),
    [
        (math.nan, 0.4),
        (0.4, math.nan),
        (math.inf, 0.4),
        (0.4, -math.inf),
        (math.nan, math.inf),
        (1e30, -3e38),
    ],
)
def test_wild_coordinates_read_what_grid_sample_reads(implementation, x, y):
    """A basis of one column: every token of the map reads at a multiple of one point."""
    size, eta, device = (4, 3), 0.3, device_of(implementation)
    tokens = random(3, 13, 8, seed=40, dtype=torch.float32).to(device).requires_grad_()
    source = torch.tensor([[x, y]], device=device)
    angle = torch.tensor([0.0, 0.7, -2.1], device=device)
    basis = torch.linspace(-2.0, 2.0, 12, device=device)[:, None]
    cosine, sine = angle.cos()[:, None], angle.sin()[:, None]
    at_x, at_y = (basis * source).unbind(1)
    grid = torch.stack([at_x * cosine - at_y * sine, at_x * sine + at_y * cosine], -1)

    def sample(grid):
        image = tokens[:, 1:].transpose(1, 2).unflatten(2, size)
        sampled = torch.nn.functional.grid_sample(
            image, grid.unflatten(1, size), padding_mode="border", align_corners=True
        )
        body = tokens[:, 1:] + eta * sampled.flatten(2).transpose(1, 2)
        return torch.cat([tokens[:, :1], body], dim=1)

    actual = kernels.warp_tokens(
        tokens, source, angle, basis, size=size, eta=eta, prefix=1, implementation=implementation
    )
    torch.testing.assert_close(actual, sample(grid), rtol=1e-5, atol=1e-5)
    assert actual.isfinite().all()
    # PyTorch's own backward pass crashes at a NaN, so it is asked at the place read for one.
    wanted = sample(grid.masked_fill(grid.isnan(), -1.0))
    upstream = random(3, 13, 8, seed=41, dtype=torch.float32).to(device)
    one, other = (torch.autograd.grad(out, tokens, upstream)[0] for out in (actual, wanted))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", *fused("warp_tokens")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_no_bit_forward_or_backward(implementation, dtype):
    """Half features beside float32 coordinates, as a network under autocast calls it."""
    device = device_of(implementation)
    given = inputs(2, (4, 3), 24, 1, dtype=dtype, device=device)
    assert given[1].dtype == given[2].dtype == torch.float32

    def call(autocast: bool):
        leaves = [t.detach().requires_grad_() for t in given[:3]]
        with torch.autocast(device, dtype, enabled=autocast):
            out = kernels.warp_tokens(
                *leaves, given[3], size=(4, 3), eta=0.3, prefix=1, implementation=implementation
            )
        return out, *torch.autograd.grad(out, leaves, given[4])

    inside, plain = call(True), call(False)
    for one, other in zip(inside, plain, strict=True):
        assert bitwise_equal(one, other)
    assert [t.dtype for t in inside] == [dtype, dtype, torch.float32, torch.float32]
