"""Convolution, ReLU and mean: every implementation that can run here against float64."""

from __future__ import annotations

import math

import numpy as np
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
from torch.nn import functional

import gsalign_kernels as kernels
from gsalign_kernels import registration
from gsalign_kernels.reference.conv import response_gradients
from gsalign_kernels.triton import conv as triton_conv

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NAMES = ("mean", "d tokens", "d weight", "d bias")
FUSED = fused("conv_relu_mean")
ALL = ["reference", *FUSED]
EXACT = ["reference", *(p for p in FUSED if p.values[0] == "cpp")]

# (B, H, W, C, O, prefix): whole tiles, cut ones on both sides, maps smaller than a kernel; channels
# of one block and of several, with and without a rest; several groups of images.
SIZES = (
    (2, 8, 4, 64, 32, 2),
    (3, 5, 7, 70, 33, 1),
    (2, 1, 1, 3, 2, 0),
    (1, 2, 9, 17, 40, 0),
    (11, 12, 8, 5, 9, 2),
)


def inputs(batch, height, width, channels, outputs, prefix, *, dtype=torch.float32, device="cpu"):
    """Tokens, weight and bias whose responses have both signs; the prefix is NaN."""
    tokens = random(batch, prefix + height * width, channels, seed=1, dtype=dtype)
    tokens[:, :prefix] = math.nan
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    weight = random(outputs, channels, 3, 3, seed=2, dtype=kind) / (3 * channels**0.5)
    bias = 0.3 * random(outputs, seed=3, dtype=kind)
    return tokens.to(device), weight.to(device), bias.to(device)


def run(implementation, tensors, size, prefix):
    """The means and the gradients of a weighted sum of them."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    mean = kernels.conv_relu_mean(*tensors, size=size, prefix=prefix, implementation=implementation)
    upstream = random(*mean.shape, seed=4).to(mean)
    return mean, *torch.autograd.grad(mean, tensors, upstream)


def in_reference(tensors, size, prefix):
    return run("reference", [in_float64(t) for t in tensors], size, prefix)


def assert_all_close(actual, expected, dtype, *, slack=1.0):
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    for name, ours, theirs in zip(NAMES, actual, expected, strict=True):
        assert_close_to_reference(
            ours, theirs, dtype if name == "d tokens" else kind, name=name, slack=slack
        )


def rounded_to(dtype, tensors):
    """As half types are multiplied where products are of their type."""
    return [t.to(dtype).to(t.dtype) for t in tensors]


@pytest.mark.parametrize("implementation", FUSED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_agrees_with_the_reference(implementation, dtype, size):
    if dtype == torch.float64 and implementation != "cpp":
        pytest.skip("float64 is left to cpp and the reference")
    tensors = inputs(*size, dtype=dtype, device=device_of(implementation))
    if implementation == "triton":
        tensors = [tensors[0], *rounded_to(dtype, tensors[1:])]
    with poisoned_memory():
        actual = run(implementation, tensors, size[1:3], size[5])
    half = implementation == "triton" and dtype in (torch.float16, torch.bfloat16)
    if half:
        # Its backward pass is PyTorch's, in half types.
        expected = in_reference(tensors, size[1:3], size[5])
        assert_close_to_reference(actual[0], expected[0], torch.float32)
        for name, ours, theirs in zip(NAMES[1:], actual[1:], expected[1:], strict=True):
            assert_close_to_reference(ours.to(dtype), theirs, dtype, name=name, slack=4.0)
        return
    # Winograd's sums lose a bit or two of float32 to its transforms, forward and back.
    assert_all_close(actual, in_reference(tensors, size[1:3], size[5]), dtype, slack=2.0)


@pytest.mark.parametrize("implementation", EXACT)
@pytest.mark.parametrize("size", [(2, 4, 3, 2, 3, 1), (1, 6, 5, 3, 2, 0)])
def test_agrees_with_sums_in_python(implementation, size):
    batch, height, width, channels, outputs, prefix = size
    tokens, weight, bias = inputs(*size, dtype=torch.float64)
    actual = kernels.conv_relu_mean(
        tokens, weight, bias, size=(height, width), prefix=prefix, implementation=implementation
    )
    given, kernel = tokens.tolist(), weight.tolist()
    for b in range(batch):
        for o in range(outputs):
            responses = []
            for y in range(height):
                for x in range(width):
                    terms = [bias[o].item()]
                    for dy in range(3):
                        for dx in range(3):
                            v, u = y + dy - 1, x + dx - 1
                            if 0 <= v < height and 0 <= u < width:
                                token = given[b][prefix + v * width + u]
                                terms += [token[c] * kernel[o][c][dy][dx] for c in range(channels)]
                    responses.append(max(math.fsum(terms), 0.0))
            wanted = math.fsum(responses) / len(responses)
            assert actual[b, o].item() == pytest.approx(wanted, rel=1e-12, abs=1e-14)


def test_error_of_winograd_stays_near_that_of_the_direct_sum():
    """At the published width; the docs quote these bounds."""
    tokens, weight, bias = inputs(2, 16, 8, 768, 256, 2)
    exact = in_reference((tokens, weight, bias), (16, 8), 2)
    direct = run("reference", (tokens, weight, bias), (16, 8), 2)
    ours = run("cpp", (tokens, weight, bias), (16, 8), 2)
    bounds = {"mean": 1e-6, "d tokens": 4e-6, "d weight": 1.5e-6, "d bias": 1e-6}
    for name, a, b, e in zip(NAMES, ours, direct, exact, strict=True):
        e = e.detach()
        error, plain = (float((t.double() - e).norm() / e.norm()) for t in (a.detach(), b.detach()))
        assert error < bounds[name], (name, error, plain)


@pytest.mark.parametrize("implementation", FUSED)
def test_signs_say_which_responses_count(implementation):
    size = (2, 5, 6, 11, 13, 1)
    tokens, weight, bias = inputs(*size, device=device_of(implementation))
    bias[3] = -100.0
    bias[4] = 100.0
    op = registration.operator("conv_relu_mean", implementation)
    _, signs = op(tokens, weight, bias, 5, 6, 1)
    image = tokens[:, 1:].double().mT.unflatten(2, (5, 6))
    response = functional.conv2d(image, weight.double(), bias.double(), padding=1)
    slopes = response_gradients(torch.full((2, 13), 30.0, device=tokens.device), signs)
    assert torch.equal(slopes, (response > 0).flatten(2).mT.float())
    # Bits past the last output are no responses.
    assert signs.shape == (2, 30, 2)


@pytest.mark.parametrize("implementation", ALL)
def test_empty_batches(implementation):
    tensors = inputs(0, 3, 2, 5, 4, 1, device=device_of(implementation))
    mean, *grads = run(implementation, tensors, (3, 2), 1)
    assert mean.shape == (0, 4) and grads[0].shape == (0, 7, 5)
    assert all(not grad.any() for grad in grads[1:])


@pytest.mark.parametrize("implementation", FUSED)
def test_nan_spoils_its_image_and_no_other(implementation):
    tokens, weight, bias = inputs(3, 8, 8, 6, 5, 0, device=device_of(implementation))
    good = kernels.conv_relu_mean(tokens, weight, bias, size=(8, 8), implementation=implementation)
    tokens[1, 37, 2] = math.nan
    mean = kernels.conv_relu_mean(tokens, weight, bias, size=(8, 8), implementation=implementation)
    assert mean[1].isnan().all()
    assert bitwise_equal(mean[[0, 2]], good[[0, 2]])


@pytest.mark.parametrize("implementation", FUSED)
def test_any_strides(implementation):
    tensors = inputs(2, 4, 5, 30, 17, 2, device=device_of(implementation))
    expected = run(implementation, tensors, (4, 5), 2)
    actual = run(implementation, [strided(t) for t in tensors], (4, 5), 2)
    assert all(map(bitwise_equal, actual, expected))
    wide = torch.cat([tensors[0], tensors[0]], dim=2)[..., :30]
    actual = run(implementation, [wide, *tensors[1:]], (4, 5), 2)
    assert all(map(bitwise_equal, actual, expected))


@pytest.mark.parametrize("implementation", FUSED)
def test_every_bit_is_the_same_for_any_threads_and_runs(implementation):
    tensors = inputs(11, 12, 8, 130, 70, 2, device=device_of(implementation))
    with threads(1):
        first = run(implementation, tensors, (12, 8), 2)
    for count in (2, 2, 3):
        with threads(count):
            again = run(implementation, tensors, (12, 8), 2)
        for name, left, right in zip(NAMES, first, again, strict=True):
            assert bitwise_equal(left, right), f"{name} with {count} threads"


@pytest.mark.parametrize("implementation", FUSED)
def test_an_image_does_not_depend_on_the_batch(implementation):
    tokens, weight, bias = inputs(11, 12, 8, 20, 9, 2, device=device_of(implementation))
    whole = run(implementation, (tokens, weight, bias), (12, 8), 2)[0]
    for b in (0, 7, 10):
        alone = run(implementation, (tokens[b : b + 1], weight, bias), (12, 8), 2)[0]
        assert bitwise_equal(alone, whole[b : b + 1])


@pytest.mark.parametrize("implementation", EXACT)
def test_gradcheck(implementation):
    tensors = inputs(2, 5, 3, 2, 3, 1, dtype=torch.float64)
    tensors[0][:, 0] = 0.5
    assert torch.autograd.gradcheck(
        lambda *given: kernels.conv_relu_mean(
            *given, size=(5, 3), prefix=1, implementation=implementation
        ),
        [t.requires_grad_() for t in tensors],
    )


@pytest.mark.parametrize("implementation", FUSED)
def test_differentiating_twice_refuses_and_names_the_reference(implementation):
    tensors = inputs(2, 3, 3, 2, 3, 0, device=device_of(implementation))
    tensors[0].requires_grad_()
    mean = kernels.conv_relu_mean(*tensors, size=(3, 3), implementation=implementation)
    (grad,) = torch.autograd.grad(mean.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"conv_relu_mean: .*'reference'"):
        grad.sum().backward()


@pytest.mark.parametrize("implementation", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(implementation, dtype):
    if dtype == torch.float64 and implementation != "cpp":
        pytest.skip("float64 is left to cpp and the reference")
    tensors = inputs(2, 3, 4, 5, 6, 1, dtype=dtype, device=device_of(implementation))
    tensors[0][:, 0] = 0.5
    op = registration.operator("conv_relu_mean", implementation)
    backward = registration.operator("conv_relu_mean_backward", implementation)
    mean, signs = op(*tensors, 3, 4, 1)
    torch.library.opcheck(
        backward,
        (mean, *tensors[:2], signs, 3, 4, 1),
        test_utils=("test_schema", "test_faketensor"),
    )
    torch.library.opcheck(op, (*(t.requires_grad_() for t in tensors), 3, 4, 1))


@pytest.mark.parametrize("implementation", FUSED)
def test_compiles_as_one_graph_and_exports(implementation):
    device = device_of(implementation)

    class Response(torch.nn.Module):
        def forward(self, tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return kernels.conv_relu_mean(
                tokens, weight, bias, size=(4, 3), prefix=2, implementation=implementation
            )

    compiled = torch.compile(Response(), fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3):
        tensors = inputs(batch, 4, 3, 5, 6, 2, device=device)
        expected = run(implementation, tensors, (4, 3), 2)
        leaves = [t.requires_grad_() for t in tensors]
        mean = compiled(*leaves)
        grads = torch.autograd.grad(mean, leaves, random(*mean.shape, seed=4).to(mean))
        for name, ours, theirs in zip(NAMES, (mean, *grads), expected, strict=True):
            assert bitwise_equal(ours, theirs), name
    arguments = tuple(t.detach() for t in tensors)
    exported = torch.export.export(Response(), arguments).module()
    assert bitwise_equal(exported(*arguments), expected[0])


@pytest.mark.parametrize("implementation", EXACT)
def test_autocast_leaves_the_mean_in_float32(implementation):
    tensors = inputs(2, 4, 4, 20, 8, 0)
    expected = in_reference(tensors, (4, 4), 0)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean = kernels.conv_relu_mean(*tensors, size=(4, 4), implementation=implementation)
    # The reference convolves as autocast does, cpp in float32.
    assert mean.dtype == torch.float32
    tolerance = torch.bfloat16 if implementation == "reference" else torch.float32
    assert_close_to_reference(mean.to(tolerance), expected, tolerance, slack=2.0)


@pytest.mark.parametrize("implementation", FUSED)
def test_autocast_lifts_half_weights_of_the_bare_operator(implementation):
    tokens, weight, bias = inputs(2, 4, 4, 20, 8, 0, device=device_of(implementation))
    weight, bias = weight.bfloat16(), bias.bfloat16()
    op = registration.operator("conv_relu_mean", implementation)
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        lifted = op(tokens, weight, bias, 4, 4, 0)
    wanted = op(tokens, weight.float(), bias.float(), 4, 4, 0)
    assert all(map(bitwise_equal, lifted, wanted))
    with pytest.raises((RuntimeError, TypeError), match="weight"):
        op(tokens, weight, bias, 4, 4, 0)


GOOD = (torch.zeros(2, 13, 5), torch.zeros(4, 5, 3, 3), torch.zeros(4))


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize(
    ("position", "value", "error", "words"),
    [
        (0, torch.zeros(2, 12, 5), ValueError, r"tokens: wanted shape \[B, 13, C\].*\[2, 12, 5\]"),
        (0, torch.zeros(13, 5), ValueError, "tokens: wanted 3 dimensions"),
        (0, np.zeros((2, 13, 5)), TypeError, "tokens: wanted a tensor, got ndarray"),
        (0, torch.zeros(2, 13, 0), ValueError, "tokens: wanted at least one channel"),
        (0, torch.zeros(2, 13, 5, dtype=torch.int32), TypeError, "tokens: .*int32"),
        (1, torch.zeros(4, 6, 3, 3), ValueError, r"weight: .*\[O, 5, 3, 3\].*\[4, 6, 3, 3\]"),
        (1, torch.zeros(4, 5, 5, 5), ValueError, r"weight: .*\[O, 5, 3, 3\]"),
        (1, torch.zeros(0, 5, 3, 3), ValueError, "weight: wanted at least one output"),
        (1, GOOD[1].to("meta"), ValueError, "weight: is on meta"),
        (2, torch.zeros(3), ValueError, r"bias: wanted shape \[4\], got \[3\]"),
        (2, torch.zeros(4, dtype=torch.bool), TypeError, "bias: .*bool"),
    ],
)
def test_errors_name_the_argument(implementation, position, value, error, words):
    arguments: list[object] = [*GOOD[:position], value, *GOOD[position + 1 :]]
    device = device_of(implementation)
    arguments = [
        a.to(device) if isinstance(a, Tensor) and a.device.type == "cpu" else a for a in arguments
    ]
    with pytest.raises(error, match=words):
        kernels.conv_relu_mean(*arguments, size=(4, 3), prefix=1, implementation=implementation)


def test_errors_of_settings():
    with pytest.raises(ValueError, match="prefix: wanted 0 or more, got -1"):
        kernels.conv_relu_mean(*GOOD, size=(14, 1), prefix=-1)
    with pytest.raises(ValueError, match="size: wanted a height"):
        kernels.conv_relu_mean(*GOOD, size=(0, 3), prefix=13)
    with pytest.raises(TypeError, match="size: wanted"):
        kernels.conv_relu_mean(*GOOD, size=4, prefix=1)


@pytest.mark.parametrize("implementation", FUSED)
def test_the_bare_operators_check_too(implementation):
    device = device_of(implementation)
    tokens, weight, bias = inputs(2, 4, 3, 5, 12, 1, device=device)
    forward = registration.operator("conv_relu_mean", implementation)
    backward = registration.operator("conv_relu_mean_backward", implementation)
    mean, signs = forward(tokens, weight, bias, 4, 3, 1)
    for good, op in (
        ([tokens, weight, bias], forward),
        ([mean, tokens, weight, signs], backward),
    ):
        op(*good, 4, 3, 1)
        for position, whole in enumerate(good):
            wrong_type = whole.float() if whole.dtype == torch.uint8 else whole.int()
            for wrong in (whole.unsqueeze(0), wrong_type, whole[..., :1]):
                broken = [*good[:position], wrong, *good[position + 1 :]]
                names = r"grad|tokens|weight|bias|signs"
                with pytest.raises((RuntimeError, TypeError, ValueError), match=names):
                    op(*broken, 4, 3, 1)
        for settings in ((4, 4, 1), (0, 3, 13), (14, 1, -1), (-4, -3, 1)):
            with pytest.raises((RuntimeError, ValueError), match=r"tokens|size"):
                op(*good, *settings)


@pytest.mark.parametrize("implementation", EXACT[1:])
def test_the_bare_operators_want_a_channel(implementation):
    tokens, weight, bias = inputs(2, 4, 3, 5, 12, 1)
    forward = registration.operator("conv_relu_mean", implementation)
    mean, signs = forward(tokens, weight, bias, 4, 3, 1)
    backward = registration.operator("conv_relu_mean_backward", implementation)
    with pytest.raises(RuntimeError, match="tokens: wanted at least one channel"):
        forward(tokens[..., :0], weight[:, :0], bias, 4, 3, 1)
    with pytest.raises(RuntimeError, match="tokens: wanted at least one channel"):
        backward(mean, tokens[..., :0], weight[:, :0], signs, 4, 3, 1)


def test_triton_multiplies_float32_as_convolutions_are_asked_to():
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    try:
        for precision in ("tf32", "ieee"):
            convolutions.fp32_precision = precision
            assert triton_conv._precision() == precision
        for allowed in (True, False):  # the older setting
            torch.backends.cudnn.allow_tf32 = allowed
            assert triton_conv._precision() == ("tf32" if allowed else "ieee")
    finally:
        torch.backends.cudnn.allow_tf32 = before == "tf32"
