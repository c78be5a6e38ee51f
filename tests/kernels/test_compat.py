"""kornia's spline functions under their own names: against kornia itself, and by what they mean."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from scipy.interpolate import RBFInterpolator
from support import bitwise_equal, device_of, fused, random

import gsalign_kernels as kernels
from gsalign_kernels import backends, compat
from gsalign_kernels.reference import tps as reference
from gsalign_kernels.warp import PADDING_MODES

IMPLEMENTATIONS = ["reference", *fused("warp_image")]


@pytest.fixture(scope="module")
def kornia():
    pytest.importorskip("kornia")
    import kornia.geometry.transform

    return kornia.geometry.transform


def pairs(batch: int = 2, side: int = 3, *, dtype: torch.dtype = torch.float64, seed: int = 0):
    """Source points on a jittered lattice and targets near them: kornia's matrix is regular."""
    axis = torch.linspace(-0.9, 0.9, side, dtype=torch.float64)
    lattice = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    source = lattice + 0.02 * random(batch, side * side, 2, seed=seed)
    target = 0.9 * lattice + 0.05 * random(batch, side * side, 2, seed=seed + 1) + 0.03
    return source.to(dtype), target.to(dtype)


def widest(implementation: str) -> torch.dtype:
    """The widest type in which an implementation warps images on this machine."""
    arguments = "warp_image", implementation, device_of(implementation), torch.float64
    return torch.float64 if backends.reason_against(*arguments) is None else torch.float32


def close(actual, wanted, dtype: torch.dtype, slack: float = 1.0) -> None:
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-4}[dtype] * slack
    torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["get_tps_transform", "warp_points_tps", "warp_image_tps"])
def test_arguments_have_kornias_names_order_and_defaults(kornia, name):
    ours = inspect.signature(getattr(compat, name)).parameters
    theirs = inspect.signature(getattr(kornia, name)).parameters
    positional = [p for p in ours.values() if p.kind is not p.KEYWORD_ONLY]
    assert [(p.name, p.default) for p in positional] == [
        (p.name, p.default) for p in theirs.values()
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kornias_numbers(kornia, dtype):
    source, target = pairs(dtype=dtype)
    points = random(2, 40, 2, seed=3, dtype=dtype)
    ours, theirs = compat.get_tps_transform(source, target), kornia.get_tps_transform(
        source, target
    )  # fmt: skip
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        close(one, other, dtype, slack=20)
    warped = compat.warp_points_tps(points, target, *ours)
    assert warped.dtype == dtype
    close(warped, kornia.warp_points_tps(points, target, *theirs), dtype)
    close(compat.warp_points_tps(source, target, *ours), target, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(7, 9), (1, 6), (5, 1), (1, 1)])
def test_kornias_images(kornia, dtype, padding_mode, align_corners, size):
    source, target = pairs(dtype=dtype)
    image = random(2, 3, *size, seed=4, dtype=dtype)
    spline = kornia.get_tps_transform(target, source)
    settings = (align_corners, padding_mode)
    wanted = kornia.warp_image_tps(image, source, *spline, *settings)
    close(compat.warp_image_tps(image, source, *spline, *settings), wanted, dtype)
    whole = compat.warp_image_tps(
        image, source, *compat.get_tps_transform(target, source), *settings
    )
    close(whole, wanted, dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_kornias_gradients(kornia, implementation):
    device = device_of(implementation)
    source, target = pairs()
    image, points = random(2, 3, 7, 9, seed=5), random(2, 20, 2, seed=6)
    upstream = random(2, 3, 7, 9, seed=7).to(device)

    dtype = widest(implementation)

    def gradients(module, dtype, **settings):
        leaves = [t.to(device, dtype).detach().clone().requires_grad_() for t in
                  (source, target, image, points)]  # fmt: skip
        first, second, pixels, where = leaves
        weights = module.get_tps_transform(second, first)
        warped = module.warp_image_tps(pixels, first, *weights, **settings)
        moved = module.warp_points_tps(where, first, *weights, **settings)
        total = (warped * upstream).sum() + moved.sin().sum()
        return torch.autograd.grad(total, leaves)

    ours = gradients(compat, dtype, implementation=implementation)
    for one, other in zip(ours, gradients(kornia, torch.float64), strict=True):
        close(one.double(), other, dtype, slack=100)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("align_corners", [False, True])
def test_operators_and_kornia_agree_on_either_ones_coefficients(
    kornia, implementation, align_corners
):
    """The oracle of the operators: kornia evaluates what tps_solve made, and the other way."""
    device = device_of(implementation)
    points, values = (t.to(device) for t in pairs())
    where = random(2, 30, 2, seed=8).to(device)
    image = random(2, 3, 7, 9, seed=9).to(device)
    settings = {"align_corners": align_corners, "implementation": implementation}
    ours = kernels.tps_solve(points, values)
    weights, affine = kornia.get_tps_transform(values, points)  # centres are the second: points
    theirs = torch.cat([weights, affine], dim=1)
    for coefficients in (ours, theirs):
        split = coefficients[:, :-3], coefficients[:, -3:]
        evaluated = kernels.tps_evaluate(coefficients, points, where, implementation=implementation)
        close(evaluated, kornia.warp_points_tps(where, points, *split), torch.float64)
        grid = kernels.tps_grid(coefficients, points, (7, 9), **settings)
        sampled = torch.nn.functional.grid_sample(image, grid, align_corners=align_corners)
        wanted = kornia.warp_image_tps(image, points, *split, align_corners=align_corners)
        close(sampled, wanted, torch.float64)
    dtype = widest(implementation)
    whole = kernels.warp_image(*(t.to(dtype) for t in (image, points, values)), **settings)
    split = ours[:, :-3], ours[:, -3:]
    wanted = kornia.warp_image_tps(image, points, *split, align_corners=align_corners)
    close(whole.double(), wanted, dtype)


def test_source_equal_to_target_is_the_identity_both_ways(kornia):
    source, _ = pairs()
    for classical in (False, True):
        weights, affine = compat.get_tps_transform(source, source, classical=classical)
        close(weights, torch.zeros_like(weights), torch.float64)
        close(affine, torch.eye(3, 2, dtype=torch.float64).roll(1, 0).expand(2, 3, 2),
              torch.float64)  # fmt: skip


def test_coinciding_and_nearly_coinciding_points(kornia):
    """Closer than 1e-4 the basis is another than kornia's, by less than 2e-9 per weight."""
    source, target = pairs(1)
    target[:, :3] = source[:, :3]
    target[:, 3] = source[:, 3] + 3e-5
    ours, theirs = (m.get_tps_transform(source, target) for m in (compat, kornia))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    close(compat.warp_points_tps(source, target, *ours), target, torch.float64)


@pytest.mark.parametrize("count", [1, 2, 1030])
def test_as_many_centres_as_kornia_takes(kornia, count):
    centers, where = random(2, count, 2, seed=10), random(2, 5, 2, seed=11)
    weights, affine = random(2, count, 2, seed=12) / count, random(2, 3, 2, seed=13)
    image = random(2, 1, 4, 5, seed=14)
    given = (centers, weights, affine)
    ours, theirs = (m.warp_points_tps(where, *given) for m in (compat, kornia))
    close(ours, theirs, torch.float64)
    ours, theirs = (m.warp_image_tps(image, *given) for m in (compat, kornia))
    close(ours, theirs, torch.float64)
    for function, first in ((compat.warp_points_tps, where), (compat.warp_image_tps, image)):
        with pytest.raises(kernels.KernelUnavailableError, match="3 to 1024 kernel centres"):
            function(first, *given, implementation="cpp")


@pytest.mark.parametrize("shapes", [(1, 3, 3, 3), (3, 1, 1, 1), (3, 3, 1, 1), (1, 1, 1, 1)])
def test_a_batch_of_one_is_shared(kornia, shapes):
    where, centers, weights, affine = (
        random(batch, *shape, seed=15 + i)
        for i, (batch, shape) in enumerate(
            zip(shapes, [(5, 2), (4, 2), (4, 2), (3, 2)], strict=True)
        )
    )
    ours, theirs = (m.warp_points_tps(where, centers, weights, affine) for m in (compat, kornia))
    assert ours.shape == theirs.shape
    close(ours, theirs, torch.float64)
    if shapes[1:] == (1, 1, 1):
        image = random(3, 2, 4, 5, seed=20)
        ours, theirs = (m.warp_image_tps(image, centers, weights, affine) for m in (compat, kornia))
        close(ours, theirs, torch.float64)


# What follows holds without kornia.


@pytest.mark.parametrize("implementation", [None, "reference"])
def test_classical_is_scipys_spline(implementation):
    source, target = pairs(1)
    where = random(1, 50, 2, seed=21)
    spline = compat.get_tps_transform(source, target, classical=True, implementation=implementation)
    got = compat.warp_points_tps(where, source, *spline, implementation=implementation)
    oracle = RBFInterpolator(
        source[0].numpy(), target[0].numpy(), kernel="thin_plate_spline", degree=1
    )
    assert np.abs(got[0].numpy() - oracle(where[0].numpy())).max() < 1e-9


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_nearest_pixel_may_be_read(implementation):
    """kornia blends only; label maps must not be blended."""
    device, dtype = device_of(implementation), widest(implementation)
    labels = torch.randint(0, 7, (2, 1, 9, 6)).to(device, dtype)
    affine = torch.tensor([[0.1, -0.2], [0.8, 0.5], [-0.4, 0.9]]).to(device, dtype)
    none = affine.new_zeros(1, 3, 2)
    found = compat.warp_image_tps(
        labels, none, none, affine[None], mode="nearest", implementation=implementation
    )
    grid = torch.nn.functional.affine_grid(
        affine[[1, 2, 0]].T.expand(2, -1, -1), [2, 1, 9, 6], align_corners=False
    )
    wanted = torch.nn.functional.grid_sample(labels, grid, mode="nearest", align_corners=False)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("align_corners", [False, True])
def test_classical_image_is_warp_image(align_corners):
    source, target = pairs(dtype=torch.float32)
    image = random(2, 3, 7, 9, seed=22, dtype=torch.float32)
    spline = compat.get_tps_transform(target, source, classical=True)
    warped = compat.warp_image_tps(image, target, *spline, align_corners, "border")
    wanted = kernels.warp_image(
        image, target, source, align_corners=align_corners, padding_mode="border"
    )
    assert bitwise_equal(warped, wanted)


def test_both_kinds_interpolate_and_the_classical_bends_less():
    """Bending: the squared second derivatives, summed over a square four times as wide."""
    source, target = pairs()
    lattice = 4 * reference.lattice((121, 121), align_corners=True, dtype=torch.float64)
    bending = []
    for classical, centers in ((False, target), (True, source)):
        spline = compat.get_tps_transform(source, target, classical=classical)
        close(compat.warp_points_tps(source, centers, *spline), target, torch.float64)
        dense = compat.warp_points_tps(lattice[None], centers, *spline).unflatten(1, (121, 121))
        xx, yy, xy = dense.diff(2, 2), dense.diff(2, 1), dense.diff(1, 1).diff(1, 2)
        terms = (xx.square(), yy.square(), 2 * xy.square())
        bending.append(sum(term.flatten(1).sum(1) for term in terms))
    assert (bending[1] < bending[0]).all()


@pytest.mark.parametrize("classical", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "cpp"])
def test_gradcheck(classical, implementation):
    source, target = pairs(1, 2)
    image, where = random(1, 2, 4, 5, seed=23), random(1, 3, 2, seed=24)

    def function(source, target, image, where):
        spline = compat.get_tps_transform(target, source, classical=classical)
        centers = target if classical else source
        settings = {"implementation": implementation}
        return (
            compat.warp_points_tps(where, centers, *spline, **settings),
            compat.warp_image_tps(image, centers, *spline, False, "border", **settings),
        )

    leaves = [t.requires_grad_() for t in (source, target, image, where)]
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32_and_rounded_once(dtype):
    source, target = pairs(dtype=dtype)
    image = random(2, 3, 5, 6, seed=25, dtype=dtype)
    weights, affine = compat.get_tps_transform(source, target)
    assert weights.dtype == affine.dtype == dtype
    moved = compat.warp_points_tps(source, target, weights, affine)
    wide = [t.float() for t in (source, target, weights, affine)]
    assert bitwise_equal(moved, compat.warp_points_tps(*wide).to(dtype))
    warped = compat.warp_image_tps(image, target, weights, affine)
    wanted = compat.warp_image_tps(image.float(), *wide[1:]).to(dtype)
    assert warped.dtype == dtype
    torch.testing.assert_close(warped, wanted, rtol=2e-2, atol=2e-2)


def test_autocast_changes_nothing():
    source, target = pairs(dtype=torch.float32)
    image = random(2, 3, 5, 6, seed=26, dtype=torch.float32)

    def everything():
        spline = compat.get_tps_transform(target, source)
        return (
            *spline,
            compat.warp_points_tps(source, source, *spline),
            compat.warp_image_tps(image, source, *spline),
        )

    with torch.autocast("cpu", torch.bfloat16):
        inside = everything()
    for one, other in zip(inside, everything(), strict=True):
        assert bitwise_equal(one, other)


def test_compiled_and_empty():
    source, target = pairs(dtype=torch.float32)
    image = random(2, 3, 5, 6, seed=27, dtype=torch.float32)

    def function(source, target, image):
        return compat.warp_image_tps(image, source, *compat.get_tps_transform(target, source))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(source, target, image), function(source, target, image))
    assert function(source[:0], target[:0], image[:0]).shape == (0, 3, 5, 6)
    mapped = torch.func.vmap(function)(*(t.unsqueeze(1) for t in (source, target, image)))
    torch.testing.assert_close(mapped[:, 0], function(source, target, image))


def test_no_dense_map_is_stored():
    """The largest tensor made on the way is the output; [H*W, K] would be 25 times as large."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    source, target = pairs(1, 5, dtype=torch.float32)
    image = torch.rand(1, 1, 64, 48)
    spline = compat.get_tps_transform(target, source)
    with Watch():
        compat.warp_image_tps(image, source, *spline, implementation="cpp")
        compat.warp_points_tps(torch.rand(1, 1536, 2), source, *spline, implementation="cpp")
    assert largest == 64 * 48


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s, t, w, a, i: compat.get_tps_transform("x", t), TypeError, "points_src: wanted"),
        (lambda s, t, w, a, i: compat.get_tps_transform(s[0], t), ValueError, "points_src: wanted"),
        (lambda s, t, w, a, i: compat.get_tps_transform(s, t[:1]), ValueError, "points_dst"),
        (lambda s, t, w, a, i: compat.warp_points_tps(s, t, w[:, 1:], a), ValueError,
         "kernel_weights: wanted shape"),
        (lambda s, t, w, a, i: compat.warp_points_tps(s, t, w, a[:, 1:]), ValueError,
         "affine_weights: wanted shape"),
        (lambda s, t, w, a, i: compat.warp_points_tps(s.expand(3, 2, 9, 2)[:, 0], t, w, a),
         ValueError, "kernel_centers: wanted a batch of 3 or 1, got 2"),
        (lambda s, t, w, a, i: compat.warp_image_tps(i[:1], t, w, a), ValueError,
         "kernel_centers: wanted a batch of 1"),
        (lambda s, t, w, a, i: compat.warp_image_tps(i, t, w[..., :1], a[..., :1]), ValueError,
         r"kernel_weights: wanted shape \[B, K, 2\]"),
        (lambda s, t, w, a, i: compat.warp_image_tps(i[..., :0], t, w, a), ValueError,
         "image: has no pixels"),
        (lambda s, t, w, a, i: compat.warp_image_tps(i, t, w, a, False, "wrap"), ValueError,
         "padding_mode: wanted one of"),
        (lambda s, t, w, a, i: compat.get_tps_transform(s * 0, s * 0), RuntimeError, "singular"),
        (lambda s, t, w, a, i: compat.get_tps_transform(s * 0, t, classical=True), RuntimeError,
         "points"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(call, error, message):
    source, target = pairs()
    weights, affine = random(2, 9, 2, seed=28), random(2, 3, 2, seed=29)
    with pytest.raises(error, match=message):
        call(source, target, weights, affine, random(2, 1, 4, 5, seed=30))
