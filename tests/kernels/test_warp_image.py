"""Image warp: every implementation against grid_sample on the float64 spline, and its gradients."""

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
    grid_sample_has_double_backward,
    in_float64,
    poisoned_memory,
    random,
    strided,
    threads,
)

import gsalign_kernels as kernels
from gsalign_kernels.reference import warp as reference
from gsalign_kernels.warp import MODES, PADDING_MODES


def lattice(side: int) -> torch.Tensor:
    axis = torch.linspace(-0.9, 0.9, side, dtype=torch.float64)
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)


def inputs(batch, channels, size, out, *, dtype, side=3, seed=0):
    coordinates = torch.float64 if dtype == torch.float64 else torch.float32
    image = random(batch, channels, *size, seed=seed, dtype=dtype)
    points = lattice(side) + 0.02 * random(batch, side * side, 2, seed=seed + 1)
    values = 1.15 * points + 0.2 * random(batch, side * side, 2, seed=seed + 2)
    upstream = random(batch, channels, *out, seed=seed + 3, dtype=dtype)
    return image, points.to(coordinates), values.to(coordinates), upstream


def run(implementation, image, points, values, upstream, **settings):
    leaves = [
        t if t.requires_grad else t.detach().requires_grad_() for t in (image, points, values)
    ]
    out = kernels.warp_image(
        *leaves, size=tuple(upstream.shape[2:]), implementation=implementation, **settings
    )
    gradients = torch.autograd.grad(out, leaves, upstream, allow_unused=True)
    return out, *(
        torch.zeros_like(leaf) if gradient is None else gradient
        for leaf, gradient in zip(leaves, gradients, strict=True)
    )


# What computes image and coordinates in float64; the others leave that to the reference.
IN_FLOAT64 = [p for p in fused("warp_image") if p.values[0] == "cpp"]
NAMES = ("warped", "d image", "d control_points", "d values")


@pytest.mark.parametrize("implementation", fused("warp_image"))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_agrees_with_float64(implementation, mode, padding_mode, align_corners, dtype):
    if dtype == torch.float64 and implementation != "cpp":
        pytest.skip("float64 is left to cpp and the reference")
    given = inputs(2, 3, (9, 14), (11, 8), dtype=dtype)
    settings = {"mode": mode, "padding_mode": padding_mode, "align_corners": align_corners}
    with poisoned_memory():
        actual = run(implementation, *(t.to(device_of(implementation)) for t in given), **settings)
    expected = run("reference", *(in_float64(t, grad=False) for t in given), **settings)
    coordinates = given[1].dtype
    types = (dtype, dtype, coordinates, coordinates)
    for name, one, other, wanted in zip(NAMES, actual, expected, types, strict=True):
        # A position is a few units in the last place off; the image's slope magnifies that.
        assert_close_to_reference(one, other.detach(), wanted, slack=30, name=name)


@pytest.mark.parametrize("implementation", fused("warp_image"))
@pytest.mark.parametrize("size", [(1, 7), (7, 1), (1, 1), (33, 70)])
@pytest.mark.parametrize("channels", [1, 17])
def test_odd_sizes(implementation, size, channels):
    dtype = torch.float64 if implementation == "cpp" else torch.float32
    given = inputs(1, channels, size, (5, 3), dtype=dtype)
    for padding_mode, align_corners in itertools.product(PADDING_MODES, (True, False)):
        settings = {"padding_mode": padding_mode, "align_corners": align_corners}
        on_device = [t.to(device_of(implementation)) for t in given]
        actual = run(implementation, *on_device, **settings)
        expected = run("reference", *(in_float64(t, grad=False) for t in given), **settings)
        for name, one, other in zip(NAMES, actual, expected, strict=True):
            assert_close_to_reference(one, other.detach(), dtype, slack=100, name=name)


@pytest.mark.parametrize("implementation", fused("warp_image"))
def test_many_tiles_and_outputs_that_gather_in_one_place(implementation):
    """More tiles than one program looks at once, and a spline that reads a small part of them."""
    image, points, values, _ = inputs(1, 1, (17, 12), (1, 1), dtype=torch.float32, side=2)
    values = 0.2 * values + 0.3
    upstream = random(1, 1, 97, 85, seed=7, dtype=torch.float32)
    given = [t.to(device_of(implementation)) for t in (image, points, values, upstream)]
    actual = run(implementation, *given)
    expected = run("reference", *(in_float64(t, grad=False) for t in given))
    for name, one, other in zip(NAMES, actual, expected, strict=True):
        assert_close_to_reference(one, other.detach(), torch.float32, slack=50, name=name)


@pytest.mark.parametrize("implementation", ["reference", *IN_FLOAT64])
@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("align_corners", [True, False])
def test_gradcheck(implementation, padding_mode, align_corners):
    image, points, values, _ = inputs(1, 2, (4, 5), (3, 4), dtype=torch.float64, side=2)

    def function(image, points, values):
        return kernels.warp_image(
            image, points, values, size=(3, 4), padding_mode=padding_mode,
            align_corners=align_corners, implementation=implementation,
        )  # fmt: skip

    leaves = [t.requires_grad_() for t in (image, points, values)]
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("implementation", ["reference", "cpp"])
def test_gradcheck_of_shared_points_and_nearest_pixels(implementation):
    image, points, values, _ = inputs(2, 2, (4, 5), (3, 4), dtype=torch.float64, side=2)

    def shared(image, points, values):
        return kernels.warp_image(image, points, values, size=(3, 4), implementation=implementation)

    leaves = [t.requires_grad_() for t in (image, points[0].clone(), values[0].clone())]
    assert torch.autograd.gradcheck(shared, leaves)

    def nearest(image):
        return kernels.warp_image(
            image, points, values, mode="nearest", padding_mode="border",
            implementation=implementation,
        )  # fmt: skip

    assert torch.autograd.gradcheck(nearest, leaves[0])


@pytest.mark.skipif(
    not grid_sample_has_double_backward(), reason="this PyTorch differentiates grid_sample once"
)
def test_reference_has_double_backward():
    image, points, values, _ = inputs(1, 2, (4, 5), (3, 4), dtype=torch.float64, side=2)

    def function(image, points, values):
        return kernels.warp_image(
            image, points, values, size=(3, 4), padding_mode="border", implementation="reference"
        )

    leaves = [t.requires_grad_() for t in (image, points, values)]
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("implementation", fused("warp_image"))
def test_double_backward_names_the_way_out(implementation):
    given = inputs(1, 2, (4, 5), (4, 5), dtype=torch.float32, side=2)[:3]
    image, points, values = (t.to(device_of(implementation)) for t in given)
    image.requires_grad_()
    out = kernels.warp_image(image, points, values, implementation=implementation)
    (gradient,) = torch.autograd.grad(out.square().sum(), image, create_graph=True)
    with pytest.raises(RuntimeError, match="implementation='reference'"):
        gradient.sum().backward()


@pytest.mark.parametrize("implementation", ["reference", *fused("warp_image")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_no_bit_forward_or_backward(implementation, dtype):
    """Half images beside float32 coordinates, as a network under autocast calls it."""
    device = device_of(implementation)
    given = [t.to(device) for t in inputs(2, 3, (9, 14), (11, 8), dtype=dtype)]
    assert given[1].dtype == given[2].dtype == torch.float32

    def call(autocast: bool):
        leaves = [t.detach().requires_grad_() for t in given[:3]]
        with torch.autocast(device, dtype, enabled=autocast):
            out = kernels.warp_image(*leaves, size=(11, 8), implementation=implementation)
        return out, *torch.autograd.grad(out, leaves, given[3])

    inside, plain = call(True), call(False)
    for one, other in zip(inside, plain, strict=True):
        assert bitwise_equal(one, other)
    assert [t.dtype for t in inside] == [dtype, dtype, torch.float32, torch.float32]


def test_autocast_lifts_half_coordinates_of_the_raw_operator():
    image, points, values, _ = inputs(2, 3, (5, 6), (5, 6), dtype=torch.bfloat16, side=2)
    halves = kernels.tps_solve(points, values).bfloat16(), points.bfloat16()
    settings = (5, 6, 0, 1, True)
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.ops.gsalign.warp_image(image, *halves, *settings)
    wanted = torch.ops.gsalign.warp_image(image, *(t.float() for t in halves), *settings)
    assert out.dtype == torch.bfloat16 and bitwise_equal(out, wanted)


def test_direction_output_to_input():
    """Every control point's value one pixel to the right: the content moves one to the left."""
    image = torch.arange(20.0).reshape(1, 1, 4, 5)
    points = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    values = points + torch.tensor([2.0 / 4, 0.0])
    out = kernels.warp_image(image, points, values, padding_mode="border")
    torch.testing.assert_close(out[..., :4], image[..., 1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[..., 4], image[..., 4], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", fused("warp_image"))
@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_identity(implementation, padding_mode, align_corners, mode):
    dtype = torch.float64 if implementation == "cpp" else torch.float32
    image = random(1, 2, 6, 7, seed=4, dtype=dtype).to(device_of(implementation))
    points = lattice(3).to(image)
    out = kernels.warp_image(
        image, points, points, mode=mode, padding_mode=padding_mode, align_corners=align_corners,
        implementation=implementation,
    )  # fmt: skip
    assert (out - image).abs().max() < (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("implementation", fused("warp_image"))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("shift", [math.nan, math.inf, -math.inf, 1e30, -1e30, 5.3, -7.7])
def test_wild_coordinates_read_what_grid_sample_reads(implementation, mode, padding_mode, shift):
    """A constant spline is the one that carries any coordinate unharmed to the sampler."""
    image = random(2, 3, 3, 4, seed=5, dtype=torch.float32)
    points = lattice(2).float().expand(2, -1, -1)
    coefficients = torch.zeros(2, 7, 2)
    coefficients[0, 4, 0] = shift
    grid = coefficients[:, 4].view(2, 1, 1, 2).expand(2, 5, 6, 2)
    settings = (MODES.index(mode), PADDING_MODES.index(padding_mode), True)
    device, namespace = device_of(implementation), namespace_of(implementation)
    spline = (coefficients.to(device), points.to(device))
    out = namespace.warp_image(image.to(device), *spline, 5, 6, *settings).cpu()
    wanted = torch.nn.functional.grid_sample(
        image, grid, mode=mode, padding_mode=padding_mode, align_corners=True
    )
    if padding_mode == "reflection" and abs(shift) == 1e30:
        # Which pixel so many reflections end on is rounding, and differs between PyTorch's own
        # devices; it has to be a pixel of the same row of the image.
        row = image[0, :, 1]
        assert (
            (out[0] >= row.amin(1)[:, None, None]) & (out[0] <= row.amax(1)[:, None, None])
        ).all()
    else:
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)
    gradients = namespace.warp_image_backward(
        torch.ones_like(out).to(device), image.to(device), *spline, *settings
    )
    assert gradients[0].isfinite().all()


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, 3e38, -3e38])
def test_reference_survives_wild_coordinates_backward(padding_mode, align_corners, value):
    """PyTorch's own backward pass crashes at some; the gradient must arrive inside the image."""
    image = random(2, 3, 3, 4, seed=6, dtype=torch.float32, grad=True)
    points = lattice(2).float().expand(2, -1, -1)
    coefficients = torch.zeros(2, 7, 2)
    coefficients[0, 4] = value
    coefficients[1, 4, 1] = value
    out = reference.warp_image(
        image, coefficients, points, (5, 6), "bilinear", padding_mode, align_corners
    )
    (gradient,) = torch.autograd.grad(out.sum(), image)
    assert gradient.isfinite().all()
    if padding_mode != "zeros":
        torch.testing.assert_close(gradient.sum(), torch.tensor(float(out.numel())))


@pytest.mark.parametrize("implementation", fused("warp_image"))
def test_infinite_gradients_reach_only_what_was_read(implementation):
    image, points, values, upstream = inputs(1, 2, (9, 14), (6, 8), dtype=torch.float32)
    upstream[0, 1, 2, 3] = math.inf
    given = [t.to(device_of(implementation)) for t in (image, points, values, upstream)]
    gradient = run(implementation, *given)[1]
    assert gradient[0, 0].isfinite().all()
    assert 1 <= int((~gradient[0, 1].isfinite()).sum()) <= 4


@pytest.mark.parametrize("implementation", fused("warp_image"))
def test_layouts_strides_and_empty_batches(implementation):
    given = inputs(2, 5, (9, 14), (6, 8), dtype=torch.float32)
    given = [t.to(device_of(implementation)) for t in given]
    plain = run(implementation, *given)
    last = run(implementation, given[0].to(memory_format=torch.channels_last), *given[1:])
    odd = run(implementation, *(strided(t) for t in given))
    for one, two, three in zip(plain, last, odd, strict=True):
        assert bitwise_equal(one, two) and bitwise_equal(one, three)
    empty = run(implementation, *(t[:0] for t in given))
    assert [tuple(t.shape) for t in empty] == [
        (0, 5, 6, 8), (0, 5, 9, 14), (0, 9, 2), (0, 9, 2)
    ]  # fmt: skip


@pytest.mark.parametrize("implementation", fused("warp_image"))
def test_same_bits_from_run_to_run_and_for_any_number_of_threads(implementation):
    out, channels = ((12, 9), 5) if implementation == "triton" else ((40, 70), 20)
    given = inputs(3, channels, (9, 14), out, dtype=torch.float32)
    given = [t.to(device_of(implementation)) for t in given]
    with threads(1):
        alone = run(implementation, *given)
    with threads(3):
        for _ in range(2):
            for one, other in zip(alone, run(implementation, *given), strict=True):
                assert bitwise_equal(one, other)


def namespace_of(implementation: str):
    return torch.ops.gsalign_triton if implementation == "triton" else torch.ops.gsalign


@pytest.mark.parametrize("implementation", fused("warp_image"))
def test_opcheck(implementation):
    given = inputs(2, 3, (5, 6), (4, 3), dtype=torch.float32, side=2)
    image, points, values, upstream = (t.to(device_of(implementation)) for t in given)
    coefficients = kernels.tps_solve(points, values)
    leaves = [t.detach().requires_grad_() for t in (image, coefficients, points)]
    namespace = namespace_of(implementation)
    torch.library.opcheck(namespace.warp_image.default, (*leaves, 4, 3, 0, 1, True))
    torch.library.opcheck(
        namespace.warp_image_backward.default,
        (upstream, image, coefficients, points, 0, 1, True),
    )


def test_compiled_equals_eager():
    image, points, values, _ = inputs(2, 3, (9, 14), (9, 14), dtype=torch.float32)

    def function(image, values):
        return kernels.warp_image(image.sin(), points, values, padding_mode="border").square().sum()

    def evaluate(function):
        leaves = [t.clone().requires_grad_() for t in (image, values)]
        result = function(*leaves)
        return result, *torch.autograd.grad(result, leaves)

    compiled = evaluate(torch.compile(function, fullgraph=True))
    for one, other in zip(compiled, evaluate(function), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"image": torch.zeros(2, 3, 4)}, ValueError, "image: wanted 4 dimensions"),
        ({"image": torch.zeros(2, 3, 0, 4)}, ValueError, "image: has no pixels|size: wanted"),
        ({"mode": "bicubic"}, ValueError, "mode: wanted one of 'bilinear', 'nearest'"),
        ({"padding_mode": "wrap"}, ValueError, "padding_mode: wanted one of 'zeros'"),
        ({"values": torch.zeros(2, 5, 2)}, ValueError, r"control_points: wanted shape \[2, 5, 2\]"),
        ({"size": (-1, 3)}, ValueError, "size: wanted a height"),
        ({"implementation": "triton"}, kernels.KernelUnavailableError, "What can: reference, cpp"),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    arguments = {
        "image": torch.zeros(2, 3, 4, 5),
        "control_points": lattice(2).float(),
        "values": lattice(2).float(),
    }
    with pytest.raises(error, match=message):
        kernels.warp_image(**{**arguments, **changes})
