"""Linear layers and attention by other ways than the plain ones: the same numbers, and when."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from gsalign.model import linear as layers
from gsalign_kernels import use_kernels

WANTED = pytest.mark.skipif(not layers._HAS_ONEDNN, reason="this PyTorch brings no oneDNN")
KEPT = pytest.mark.skipif(
    not layers._KEEPS_BFLOAT16, reason="oneDNN has no bfloat16 on this processor"
)


def given(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def layer(bias=True):
    """Tokens ``[2, 5, 12]``, weight ``[7, 12]`` and a bias."""
    return given(2, 5, 12), given(7, 12, seed=1), given(7, seed=2) if bias else None


@pytest.fixture
def products(monkeypatch):
    """Counts what oneDNN is asked for."""
    asked = []
    plain = layers._onednn

    def counting(*arguments):
        asked.append(arguments)
        return plain(*arguments)

    monkeypatch.setattr(layers, "_onednn", counting)
    return asked


@WANTED
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("turned", [False, True])
def test_linear_and_its_gradients(products, bias, turned):
    tensors = [t for t in layer(bias) if t is not None]
    if turned:
        tensors[0] = tensors[0].transpose(0, 1)
        tensors[1] = tensors[1].t().contiguous().t()
    upstream = given(*tensors[0].shape[:2], 7, seed=3).transpose(0, 1).contiguous().transpose(0, 1)
    ours = [t.detach().requires_grad_() for t in tensors]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    result = layers.linear(*ours, *([] if bias else [None]))
    wanted = functional.linear(*exact)
    grads = torch.autograd.grad(result, ours, upstream)
    wanted_grads = torch.autograd.grad(wanted, exact, upstream.double())
    for left, right in zip((result, *grads), (wanted, *wanted_grads), strict=True):
        torch.testing.assert_close(left.double(), right, rtol=1e-5, atol=1e-5)
    assert len(products) == 3


@WANTED
def test_only_the_gradients_asked_for(products):
    tokens, weight, bias = layer()
    result = layers.linear(tokens, weight.requires_grad_(), bias)
    (grad,) = torch.autograd.grad(result.sum(), weight)
    torch.testing.assert_close(grad, tokens.flatten(0, 1).sum(dim=0).expand(7, -1))
    assert len(products) == 2


@WANTED
def test_gelu_rides_along_without_gradients(products):
    tokens, weight, bias = layer()
    exact = functional.gelu(functional.linear(tokens.double(), weight.double(), bias.double()))
    with torch.no_grad():
        alone = layers.linear_gelu(tokens, weight, bias)
    assert products[0][3] == "gelu"
    torch.testing.assert_close(alone.double(), exact, rtol=1e-5, atol=1e-6)
    trained = layers.linear_gelu(tokens, weight.requires_grad_(), bias)
    assert len(products[1]) == 3 and trained.requires_grad
    torch.testing.assert_close(trained.double(), exact, rtol=1e-5, atol=1e-6)


@WANTED
@pytest.mark.parametrize(
    "context",
    [
        lambda: use_kernels("reference"),
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.backends.mkldnn.flags(enabled=False),
        lambda: FlopCounterMode(display=False),
    ],
)
def test_left_to_pytorch(products, context):
    tokens, weight, bias = layer()
    with torch.no_grad(), context():
        result = layers.linear(tokens, weight, bias)
        wanted = functional.linear(tokens, weight, bias)
    assert torch.equal(result, wanted) and not products


@WANTED
def test_other_types_and_empty_batches_are_left_to_pytorch(products):
    tokens, weight, bias = layer()
    for dtype in (torch.float64, torch.bfloat16):
        arguments = tokens.to(dtype), weight.to(dtype), bias.to(dtype)
        assert torch.equal(layers.linear(*arguments), functional.linear(*arguments))
    assert layers.linear(tokens[:0], weight, bias).shape == (0, 5, 7)
    assert layers.linear(tokens.to("meta"), weight.to("meta"), bias.to("meta")).is_meta
    assert not products


def test_compiled_programs_have_the_plain_layer(products):
    tokens, weight, bias = layer()
    compiled = torch.compile(layers.linear_gelu, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(tokens, weight, bias), functional.gelu(functional.linear(tokens, weight, bias))
    )
    assert not products


def test_transforms_have_the_plain_layer(products):
    tokens, weight, bias = layer()
    per_sample = torch.func.vmap(torch.func.grad(lambda t: layers.linear(t, weight, bias).sum()))
    torch.testing.assert_close(per_sample(tokens), weight.sum(dim=0).expand(2, 5, -1))
    assert not products


def test_can_be_differentiated_twice():
    leaves = [t.requires_grad_() for t in layer()]

    def curvature():
        (grad,) = torch.autograd.grad(
            layers.linear(*leaves).pow(3).sum(), leaves[0], create_graph=True
        )
        return torch.autograd.grad(grad.square().sum(), leaves)

    ours = curvature()
    with use_kernels("reference"):
        wanted = curvature()
    for left, right in zip(ours, wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4 * float(right.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_attention(dtype, autocast):
    query, key, value = (given(2, 3, n, 8, seed=n, dtype=dtype) for n in (4, 7, 7))
    wanted = functional.scaled_dot_product_attention(query.double(), key.double(), value.double())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        mixed = layers.attention(query, key, value)
    tolerance = 1e-6 if dtype == torch.float32 and not autocast else 2e-2
    torch.testing.assert_close(mixed.double(), wanted, rtol=tolerance, atol=tolerance)
    assert mixed.dtype == (torch.bfloat16 if autocast and dtype == torch.float32 else dtype)


@KEPT
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_kept_weights_follow_what_is_written(products, gelu, inference):
    tokens, weight, bias = layer()
    weight = torch.nn.Parameter(weight)
    call = layers.linear_gelu if gelu else layers.linear

    def exact():
        plain = functional.linear(
            tokens.bfloat16().double(), weight.bfloat16().double(), bias.bfloat16().double()
        )
        return (functional.gelu(plain) if gelu else plain).detach()

    context = torch.inference_mode if inference else torch.no_grad
    with layers.keeping_weights():
        for scale in (1.0, 1.0, -3.0):
            if scale != 1.0:
                with torch.no_grad():
                    weight.mul_(scale)
            with context(), torch.autocast("cpu", torch.bfloat16):
                result = call(tokens, weight, bias)
            assert result.dtype == torch.bfloat16 and not result.requires_grad
            torch.testing.assert_close(result.double(), exact(), rtol=1e-2, atol=1e-2)
        assert products[0][1] is products[1][1] is not products[2][1]
        with torch.autocast("cpu", torch.bfloat16):
            assert call(tokens, weight, bias).requires_grad
        assert len(products) == 3
    assert layers._kept.get() is None
    with context(), torch.autocast("cpu", torch.bfloat16):
        call(tokens, weight, bias)
    assert len(products) == 3


@WANTED
def test_only_whole_parameters_are_kept(products):
    tokens, weight, bias = layer()
    weight = torch.nn.Parameter(weight)
    with layers.keeping_weights(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        first = layers.linear(tokens, weight[:3], bias[:3])
        assert torch.equal(first, functional.linear(tokens, weight[:3], bias[:3]))
        with use_kernels("reference"):
            layers.linear(tokens, weight, bias)
    assert not products


@WANTED
def test_where_onednn_has_no_bfloat16_weights_are_left_to_pytorch(products, monkeypatch):
    monkeypatch.setattr(layers, "_KEEPS_BFLOAT16", False)
    tokens, weight, bias = layer()
    weight = torch.nn.Parameter(weight)
    with layers.keeping_weights(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        result = layers.linear(tokens, weight, bias)
        assert torch.equal(result, functional.linear(tokens, weight, bias))
    assert not products
    assert not layers._has_onednn("_linear_pointwise", "an_operator_that_is_gone")
