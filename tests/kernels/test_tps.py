"""Thin-plate splines: every implementation against float64, SciPy, golden grids and calculus."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.interpolate import RBFInterpolator
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

import gsalign_kernels as kernels
from gsalign_kernels.reference import tps as reference

GOLDEN = Path(__file__).parent.parent / "golden"
COORDINATES = [torch.float32, torch.float64]


def spread_points(batch: int, count: int, seed: int) -> torch.Tensor:
    """Control points in [-1, 1]^2 that keep a distance from each other: a jittered lattice."""
    side = math.ceil(math.sqrt(count))
    axis = torch.linspace(-1, 1, side, dtype=torch.float64)
    lattice = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)[:count]
    jitter = random(batch, count, 2, seed=seed).clamp(-1, 1) * (0.25 / side)
    return lattice + jitter


def scalar_spline(points, values, at) -> list[float]:
    """An independent spline in plain Python: Gaussian elimination and a loop, no tensors."""

    def u(r2: float) -> float:
        return 0.5 * r2 * math.log(max(r2, 1e-8))

    count, order = len(points), len(points) + 3
    rows = []
    for x, y in points:
        rows.append([u((x - p) ** 2 + (y - q) ** 2) for p, q in points] + [1.0, x, y])
    for a in range(3):
        rows.append([(1.0, x, y)[a] for x, y in points] + [0.0, 0.0, 0.0])
    rhs = [[float(c) for c in v] for v in values] + [[0.0] * len(values[0]) for _ in range(3)]
    for step in range(order):
        best = max(range(step, order), key=lambda i: abs(rows[i][step]))
        rows[step], rows[best], rhs[step], rhs[best] = rows[best], rows[step], rhs[best], rhs[step]
        for i in range(order):
            if i != step:
                factor = rows[i][step] / rows[step][step]
                rows[i] = [a - factor * b for a, b in zip(rows[i], rows[step], strict=True)]
                rhs[i] = [a - factor * b for a, b in zip(rhs[i], rhs[step], strict=True)]
    solved = [[value / rows[i][i] for value in rhs[i]] for i in range(order)]
    x, y = at
    design = [u((x - p) ** 2 + (y - q) ** 2) for p, q in points] + [1.0, x, y]
    return [sum(d * solved[i][v] for i, d in enumerate(design)) for v in range(len(solved[count]))]


@pytest.mark.parametrize("implementation", ["reference", *fused("tps_solve")])
def test_agrees_with_scalar_arithmetic(implementation):
    device = device_of(implementation)
    points, values = spread_points(1, 7, 1)[0].to(device), random(7, 3, seed=2).to(device)
    where = random(5, 2, seed=3).to(device)
    coefficients = kernels.tps_solve(points, values[None], implementation=implementation)
    got = kernels.tps_evaluate(coefficients, points, where, implementation=implementation)[0]
    for n in range(5):
        wanted = scalar_spline(points.tolist(), values.tolist(), where[n].tolist())
        assert got[n].tolist() == pytest.approx(wanted, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("implementation", ["reference", *fused("tps_solve")])
@pytest.mark.parametrize("count", [3, 4, 25, 100])
def test_agrees_with_scipy(implementation, count):
    points, values = spread_points(1, count, 4)[0], random(count, 2, seed=5)
    where = random(50, 2, seed=6)
    oracle = RBFInterpolator(points.numpy(), values.numpy(), kernel="thin_plate_spline", degree=1)
    on_device = [t.to(device_of(implementation)) for t in (points, values[None], where)]
    coefficients = kernels.tps_solve(*on_device[:2], implementation=implementation)
    got = kernels.tps_evaluate(
        coefficients, on_device[0], on_device[2], implementation=implementation
    )[0].cpu()
    assert np.abs(got.numpy() - oracle(where.numpy())).max() < 1e-8 * np.abs(values.numpy()).max()


@pytest.mark.parametrize("implementation", ["reference", *fused("tps_solve")])
@pytest.mark.parametrize("count", [4, 9, 25])
def test_golden_grids(implementation, count):
    golden = np.load(GOLDEN / f"op_tpsgrid_k{count}.npz")
    points = torch.from_numpy(golden["ctrl_points"])
    source = torch.from_numpy(golden["source"]).requires_grad_()
    size = tuple(int(length) for length in golden["feat_hw"])
    device = device_of(implementation)
    basis = kernels.tps_basis(points.to(device), size, implementation=implementation).cpu()
    grid = basis @ source
    assert np.abs(grid.detach().numpy() - golden["grid_fp64"]).max() < 1e-5
    (gradient,) = torch.autograd.grad(grid, source, torch.from_numpy(golden["upstream"]))
    wanted = golden["grad_source"]
    assert np.abs(gradient.numpy() - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("implementation", fused("tps_solve"))
@pytest.mark.parametrize("dtype", COORDINATES)
@pytest.mark.parametrize(
    ("batch", "count", "columns"), [(1, 3, 2), (3, 4, 2), (2, 9, 5), (2, 40, 1)]
)
def test_forward_and_gradients_agree_with_float64(implementation, dtype, batch, count, columns):
    device = device_of(implementation)
    points = spread_points(batch, count, 7).to(dtype)
    values = random(batch, count, columns, seed=8, dtype=dtype)
    where = random(batch, 11, 2, seed=9, dtype=dtype)
    upstream = random(batch, 7, 5, columns, seed=10, dtype=dtype)
    upstream_points = random(batch, 11, columns, seed=11, dtype=dtype)

    def run(chosen, *leaves):
        coefficients = kernels.tps_solve(*leaves[:2], regularization=0.01, implementation=chosen)
        grid = kernels.tps_grid(
            coefficients, leaves[0], (7, 5), align_corners=False, implementation=chosen
        )
        at = kernels.tps_evaluate(coefficients, leaves[0], leaves[2], implementation=chosen)
        like = {"dtype": grid.dtype, "device": grid.device}
        gradients = torch.autograd.grad(
            [grid, at], leaves, [upstream.to(**like), upstream_points.to(**like)]
        )
        return coefficients, grid, at, *gradients

    with poisoned_memory():
        leaves = [strided(t.to(device)).requires_grad_() for t in (points, values, where)]
        actual = run(implementation, *leaves)
    expected = run("reference", *(in_float64(t) for t in (points, values, where)))
    names = ("coefficients", "grid", "values", "d points", "d values", "d where")
    for name, one, other in zip(names, actual, expected, strict=True):
        # Both sides solve the same rounded inputs; what is left is the system's condition.
        assert_close_to_reference(one, other.detach(), dtype, slack=200, name=name)


@pytest.mark.parametrize("implementation", ["reference", *fused("tps_solve")])
def test_gradcheck(implementation):
    device = device_of(implementation)
    points = spread_points(2, 5, 12).to(device).requires_grad_()
    values = random(2, 5, 2, seed=13).to(device).requires_grad_()
    where = random(2, 3, 2, seed=14).to(device).requires_grad_()

    def function(points, values, where):
        coefficients = kernels.tps_solve(points, values, implementation=implementation)
        return (
            kernels.tps_grid(coefficients, points, (3, 2), implementation=implementation),
            kernels.tps_evaluate(coefficients, points, where, implementation=implementation),
        )

    # Triton's interpreter takes a second per evaluation, so there along random directions only.
    fast = implementation == "triton"
    assert torch.autograd.gradcheck(function, (points, values, where), fast_mode=fast)


def test_reference_has_double_backward():
    points, values = spread_points(1, 4, 15).requires_grad_(), random(1, 4, 1, seed=16, grad=True)

    def function(points, values):
        coefficients = kernels.tps_solve(points, values, implementation="reference")
        return kernels.tps_grid(coefficients, points, (2, 2), implementation="reference")

    assert torch.autograd.gradgradcheck(function, (points, values))


def test_fused_double_backward_names_the_way_out():
    values = random(1, 4, 2, seed=17, grad=True)
    coefficients = kernels.tps_solve(spread_points(1, 4, 18).requires_grad_(), values)
    (gradient,) = torch.autograd.grad(coefficients.square().sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match="implementation='reference'"):
        gradient.sum().backward()


@pytest.mark.parametrize("implementation", fused("tps_solve"))
@pytest.mark.parametrize("operator", ["tps_solve", "tps_evaluate", "tps_grid"])
def test_opcheck(operator, implementation):
    device = device_of(implementation)
    namespace = torch.ops.gsalign_triton if implementation == "triton" else torch.ops.gsalign
    points = spread_points(2, 5, 19).float().to(device).requires_grad_()
    values = random(2, 5, 2, seed=20, dtype=torch.float32).to(device).requires_grad_()
    solved = namespace.tps_solve(points.detach(), values.detach(), 0.1, True)
    coefficients = solved[0].clone().requires_grad_()
    where = random(2, 3, 2, seed=21, dtype=torch.float32).to(device).requires_grad_()
    forward, backward = {
        "tps_solve": (
            (points, values, 0.1, True),
            (torch.randn_like(solved[0]), solved[0], points.detach(), solved[1]),
        ),
        "tps_evaluate": (
            (coefficients, points, where),
            (
                torch.randn_like(where),
                coefficients.detach(),
                points.detach(),
                where.detach(),
            ),
        ),
        "tps_grid": (
            (coefficients, points, 3, 4, True),
            (torch.randn(2, 3, 4, 2, device=device), coefficients.detach(), points.detach(), True),
        ),
    }[operator]
    torch.library.opcheck(getattr(namespace, operator).default, forward)
    torch.library.opcheck(getattr(namespace, f"{operator}_backward").default, backward)


@pytest.mark.parametrize("implementation", fused("tps_solve"))
def test_same_bits_from_run_to_run_and_for_any_number_of_threads(implementation):
    device = device_of(implementation)
    points = spread_points(5, 9, 22).float().to(device)
    values = random(5, 9, 2, seed=23, dtype=torch.float32).to(device)

    def run():
        leaves = [points.clone().requires_grad_(), values.clone().requires_grad_()]
        coefficients = kernels.tps_solve(*leaves, implementation=implementation)
        grid = kernels.tps_grid(coefficients, leaves[0], (40, 61), implementation=implementation)
        return grid, *torch.autograd.grad(grid.square().sum(), leaves)

    with threads(1):
        alone = run()
    with threads(3):
        together = [run() for _ in range(3)]
    for results in together:
        for one, other in zip(alone, results, strict=True):
            assert bitwise_equal(one, other)


@pytest.mark.parametrize("implementation", ["reference", *fused("tps_solve")])
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 1), (4, 3)])
def test_basis_is_the_identity_on_its_own_points(implementation, align_corners, size):
    """Values equal to the control points give the pixel positions themselves, rows sum to 1."""
    points = spread_points(1, 9, 24)[0]
    basis = kernels.tps_basis(
        points.to(device_of(implementation)),
        size,
        align_corners=align_corners,
        implementation=implementation,
    ).cpu()
    lattice = reference.lattice(size, align_corners=align_corners, dtype=torch.float64)
    assert basis.shape == (size[0] * size[1], 9)
    assert (basis.sum(1) - 1).abs().max() < 1e-12
    assert (basis @ points - lattice).abs().max() < 1e-12


def test_basis_is_made_in_float64_and_returned_in_the_callers_type():
    points = spread_points(1, 25, 25)[0].float()
    basis = kernels.tps_basis(points.requires_grad_(), (16, 8))
    exact = kernels.tps_basis(points.detach().double(), (16, 8))
    assert basis.dtype == torch.float32 and not basis.requires_grad
    assert bitwise_equal(basis, exact.float())
    assert kernels.tps_basis(points.detach().half(), (2, 2)).dtype == torch.float32


def test_half_types_are_computed_in_float32():
    points, values = spread_points(1, 4, 26)[0].half(), random(1, 4, 2, seed=27, dtype=torch.half)
    coefficients = kernels.tps_solve(points, values)
    assert coefficients.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        lifted = torch.ops.gsalign.tps_grid(coefficients.bfloat16(), points[None], 2, 2, True)
    assert lifted.dtype == torch.float32


@pytest.mark.parametrize("implementation", ["reference", *fused("tps_solve")])
def test_empty_batch_and_no_columns(implementation):
    device = device_of(implementation)
    points = spread_points(1, 4, 28)[0].float().to(device)
    solve = {"implementation": implementation}

    def zeros(*shape):
        return torch.zeros(*shape, device=device)

    assert kernels.tps_solve(points, zeros(0, 4, 2), **solve).shape == (0, 7, 2)
    assert kernels.tps_solve(points, zeros(2, 4, 0), **solve).shape == (2, 7, 0)
    coefficients = kernels.tps_solve(points, zeros(2, 4, 2), **solve)
    nowhere = kernels.tps_evaluate(coefficients, points, zeros(0, 2), **solve)
    assert nowhere.shape == (2, 0, 2)


BAD_POINTS = {
    "repeated": ([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], 1, "singular"),
    "collinear": ([[-1.0, -1.0], [0.0, 0.0], [1.0, 1.0], [0.5, 0.5]], 1, "singular"),
    "not a number": ([[math.nan, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], 2, "not finite"),
    "infinite": ([[0.0, 0.0], [-1.0, 0.0], [math.inf, 0.0], [0.0, 1.0]], 2, "not finite"),
}


@pytest.mark.parametrize("implementation", ["reference", *fused("tps_solve")])
@pytest.mark.parametrize("dtype", COORDINATES)
@pytest.mark.parametrize("case", BAD_POINTS)
def test_control_points_that_give_no_spline_are_told(implementation, dtype, case):
    """Among good samples: the bad one has its info and NaN, the others their coefficients."""
    bad, info, message = BAD_POINTS[case]
    device = device_of(implementation)
    points = spread_points(11, 4, 29).to(dtype)
    points[9] = torch.tensor(bad, dtype=dtype)
    points = points.to(device).requires_grad_()
    values = random(11, 4, 2, seed=30, dtype=dtype).to(device).requires_grad_()
    solution = kernels.tps_solve_ex(points, values, implementation=implementation)
    assert solution.info.dtype == torch.int32
    assert solution.info.tolist() == [info if sample == 9 else 0 for sample in range(11)]
    good = [sample for sample in range(11) if sample != 9]
    assert solution.coefficients[9].isnan().all()
    expected = reference.tps_solve(points.detach().double(), values.detach().double(), 0.0)[0]
    assert_close_to_reference(solution.coefficients[good], expected[good].detach(), dtype, slack=50)
    gradients = torch.autograd.grad(solution.coefficients[good].sum(), (points, values))
    for gradient in gradients:
        assert gradient[good].isfinite().all()
    for call in (kernels.tps_solve, kernels.tps_solve_ex):
        with pytest.raises(RuntimeError, match=f"control_points: those of sample 9 .*{message}"):
            call(points, values, check_errors=True, implementation=implementation)


@pytest.mark.parametrize("implementation", ["reference", *fused("tps_solve")])
@pytest.mark.parametrize("count", [9, 40, 128])
def test_a_repeated_point_among_many_is_found_and_a_near_one_is_not(implementation, count):
    # Triton's interpreter is slow.
    batch = 1 if implementation == "triton" else 20
    points = spread_points(batch, count, 31)
    near = points.clone()
    for sample in range(batch):
        points[sample, count - 1] = points[sample, sample % (count - 1)]
        near[sample, count - 1] = near[sample, sample % (count - 1)] + 1e-3
    device = device_of(implementation)
    points, near = points.to(device), near.to(device)
    values = random(batch, count, 2, seed=32).to(device)
    solve = {"implementation": implementation}
    assert (kernels.tps_solve_ex(points, values, **solve).info == 1).all()
    solution = kernels.tps_solve_ex(near, values, **solve)
    assert (solution.info == 0).all()
    at = kernels.tps_evaluate(solution.coefficients, near, near, **solve)
    assert (at - values).abs().max() < 1e-6


@pytest.mark.parametrize("implementation", ["reference", *fused("tps_solve")])
def test_random_points_on_a_line_are_always_found(implementation):
    """Three or four points, one of them twice or all on one line, at any place and scale."""
    device = device_of(implementation)
    for count in (3, 4):
        points = random(400, count, 2, seed=38)
        points[:200, -1] = points[:200, 0]
        if count == 3:
            along = random(200, 1, 1, seed=39)
            points[200:, 2:] = points[200:, :1] + along * (points[200:, 1:2] - points[200:, :1])
        else:
            points = points[:200]
        values = torch.zeros(len(points), count, 1, dtype=torch.float64)
        solution = kernels.tps_solve_ex(
            points.to(device), values.to(device), implementation=implementation
        )
        assert (solution.info == 1).all()


def test_a_sample_is_solved_alike_alone_and_in_a_batch():
    """Lanes and rows differ in the order of sums only, and factors can be taken apart."""
    points, values = spread_points(13, 25, 33), random(13, 25, 3, seed=34)
    together = torch.ops.gsalign.tps_solve(points, values, 0.0, True)
    upstream = random(13, 28, 3, seed=35)
    backward = torch.ops.gsalign.tps_solve_backward(upstream, together[0], points, together[1])
    for sample in (0, 7, 8, 12):
        one = slice(sample, sample + 1)
        alone = torch.ops.gsalign.tps_solve(points[one], values[one], 0.0, True)
        torch.testing.assert_close(alone[0], together[0][one], rtol=1e-10, atol=1e-11)
        gradients = torch.ops.gsalign.tps_solve_backward(
            upstream[one], together[0][one], points[one], together[1][one]
        )
        for one_gradient, all_gradients in zip(gradients, backward, strict=True):
            torch.testing.assert_close(one_gradient, all_gradients[one], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("implementation", ["reference", *fused("tps_solve")])
def test_shared_control_points_are_those_of_every_sample(implementation):
    device = device_of(implementation)
    points = spread_points(1, 9, 36)[0].to(device).requires_grad_()
    values = random(5, 9, 2, seed=37).to(device).requires_grad_()

    def run(points, values):
        solution = kernels.tps_solve_ex(points, values, implementation=implementation)
        return solution, torch.autograd.grad(solution.coefficients.square().sum(), (points, values))

    shared, shared_gradients = run(points, values)
    each, gradients = run(points.detach().repeat(5, 1, 1).requires_grad_(), values)
    assert shared.info.tolist() == [0] * 5
    torch.testing.assert_close(shared.coefficients, each.coefficients)
    torch.testing.assert_close(shared_gradients[0], gradients[0].sum(0))
    torch.testing.assert_close(shared_gradients[1], gradients[1])


def test_compiled_equals_eager():
    points, values = spread_points(2, 9, 30).float(), random(2, 9, 2, seed=31, dtype=torch.float32)

    def function(points, values):
        coefficients = kernels.tps_solve(points, values)
        return kernels.tps_grid(coefficients, points, (6, 4)).square().sum()

    def run(function):
        leaves = [points.clone().requires_grad_(), values.clone().requires_grad_()]
        result = function(*leaves)
        return result, *torch.autograd.grad(result, leaves)

    for eager, compiled in zip(
        run(function), run(torch.compile(function, fullgraph=True)), strict=True
    ):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: kernels.tps_solve([1.0], torch.zeros(1, 4, 2)), TypeError, "control_points"),
        (
            lambda: kernels.tps_solve(torch.zeros(4, 3), torch.zeros(1, 4, 2)),
            ValueError,
            r"control_points: wanted shape \[1, K, 2\], got \[1, 4, 3\]",
        ),
        (
            lambda: kernels.tps_solve(torch.zeros(2, 2), torch.zeros(1, 2, 2)),
            ValueError,
            "control_points: wanted 3 to",
        ),
        (
            lambda: kernels.tps_solve(torch.zeros(4, 2), torch.zeros(1, 5, 2)),
            ValueError,
            r"values: wanted shape \[B, 4, V\]",
        ),
        (
            lambda: kernels.tps_solve(torch.zeros(4, 2), torch.zeros(1, 4, 2), regularization=-1.0),
            ValueError,
            "regularization",
        ),
        (
            lambda: kernels.tps_solve(torch.zeros(4, 2).int(), torch.zeros(1, 4, 2)),
            TypeError,
            "control_points: wanted float32",
        ),
        (
            lambda: kernels.tps_solve(torch.zeros(4, 2), torch.zeros(1, 4, 2, device="meta")),
            ValueError,
            "is on meta but",
        ),
        (
            lambda: kernels.tps_grid(torch.zeros(1, 7, 2), torch.zeros(4, 2), (0, 4)),
            ValueError,
            "size: wanted a height and width of at least 1",
        ),
        (
            lambda: kernels.tps_grid(torch.zeros(1, 7, 2), torch.zeros(4, 2), 16),
            TypeError,
            r"size: wanted \(height, width\)",
        ),
        (
            lambda: kernels.tps_grid(torch.zeros(1, 6, 2), torch.zeros(4, 2), (2, 2)),
            ValueError,
            "coefficients",
        ),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_raw_operator_refuses_what_would_read_out_of_bounds():
    with pytest.raises(RuntimeError, match="coefficients"):
        torch.ops.gsalign.tps_grid(torch.zeros(1, 5, 2), torch.zeros(1, 4, 2), 2, 2, True)
    with pytest.raises(RuntimeError, match="factors"):
        torch.ops.gsalign.tps_solve_backward(
            torch.zeros(1, 7, 1),
            torch.zeros(1, 7, 1),
            torch.zeros(1, 4, 2),
            torch.zeros(1, 24, dtype=torch.float64),
        )
