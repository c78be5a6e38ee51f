"""Masked prototype loss: every implementation that can run here against the float64 reference."""

from __future__ import annotations

import math
from pathlib import Path

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
from gsalign_kernels.reference.prototype import class_means

GOLDEN = Path(__file__).parents[1] / "golden" / "op_dam_4x4.npz"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NAMES = ("alignment", "entropy", "d features", "d masks")
ALL = ["reference", *fused("masked_prototype_loss")]

# (B, D, classes)
SIZES = ((16, 48, 4), (3, 769, 2), (13, 7, 13), (2, 256, 1), (1, 300, 1), (65, 5, 9), (300, 12, 5))


def inputs(batch, channels, classes, *, dtype=torch.float32, seed=0, device="cpu"):
    """Features, masks in (0, 1) and shuffled labels, far from 0 and of both signs."""
    features = random(batch, channels, seed=seed, dtype=dtype)
    masks = random(batch, channels, seed=seed + 1).sigmoid().to(dtype)
    generator = torch.Generator().manual_seed(seed + 2)
    names = torch.arange(classes) * 7_000_000_000 - 3
    labels = names[torch.randint(classes, (batch,), generator=generator)]
    return features.to(device), masks.to(device), labels.to(device)


def run(implementation, features, masks, labels, weights=(1.3, 0.7)):
    """Both losses and the gradients of their weighted sum."""
    features, masks = (t.detach().requires_grad_() for t in (features, masks))
    losses = kernels.masked_prototype_loss(features, masks, labels, implementation=implementation)
    total = weights[0] * losses[0] + weights[1] * losses[1]
    return *losses, *torch.autograd.grad(total, (features, masks))


def in_reference(features, masks, labels, **options):
    return run("reference", in_float64(features), in_float64(masks), labels.cpu(), **options)


def assert_all_close(actual, expected, dtype, *, slack=1.0):
    losses = torch.float64 if dtype == torch.float64 else torch.float32
    for name, ours, theirs in zip(NAMES, actual, expected, strict=True):
        kind = dtype if name.startswith("d ") else losses
        assert_close_to_reference(ours, theirs, kind, name=name, slack=slack)


@pytest.mark.parametrize("implementation", fused("masked_prototype_loss"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_agrees_with_the_reference(implementation, dtype, size):
    if dtype == torch.float64 and implementation != "cpp":
        pytest.skip("float64 is left to cpp and the reference")
    arguments = inputs(*size, dtype=dtype, device=device_of(implementation))
    # The losses are means: without the factor, gradients would be float16's denormal numbers.
    weights = (1.3 * size[0] * size[1], 0.7 * size[0] * size[1])
    with poisoned_memory():
        actual = run(implementation, *arguments, weights=weights)
    # Of a sample alone in its class the gradient is what is left of terms some ten times as large:
    # 1.2e-6 off in the norm was seen with eight draws.
    slack = 4.0 if size[0] == 1 else 1.0
    assert_all_close(actual, in_reference(*arguments, weights=weights), dtype, slack=slack)


@pytest.mark.parametrize("implementation", fused("masked_prototype_loss"))
def test_each_loss_by_itself(implementation):
    arguments = inputs(16, 48, 4, device=device_of(implementation))
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        actual = run(implementation, *arguments, weights=weights)
        expected = in_reference(*arguments, weights=weights)
        assert_all_close(actual, expected, torch.float32)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize(("batch", "channels"), [(0, 5), (3, 0), (0, 0)])
def test_empty_batches_and_no_channels_cost_nothing(implementation, batch, channels):
    arguments = inputs(batch, channels, 2, device=device_of(implementation))
    alignment, entropy, *grads = run(implementation, *arguments)
    assert alignment.item() == 0.0 and entropy.item() == 0.0
    assert all(grad.shape == (batch, channels) for grad in grads)


def scalar_losses(features: Tensor, masks: Tensor, labels: Tensor):
    """The documented formulas in Python's own arithmetic, one class after the other."""

    def unit(row):
        norm = max(math.sqrt(math.fsum(v * v for v in row)), 1e-12)
        return [v / norm for v in row]

    rows, weights, names = features.tolist(), masks.tolist(), labels.tolist()
    distances, logarithms = [], []
    for row, mask, name in zip(rows, weights, names, strict=True):
        members = [r for r, other in zip(rows, names, strict=True) if other == name]
        centre = unit([math.fsum(column) / len(members) for column in zip(*members, strict=True)])
        prototype = unit([c * m for c, m in zip(centre, mask, strict=True)])
        distances += [(g - p) ** 2 for g, p in zip(unit(row), prototype, strict=True)]
        logarithms += [m * math.log(max(m, 1e-6)) for m in mask]
    return math.fsum(distances) / len(distances), -math.fsum(logarithms) / len(logarithms)


@pytest.mark.parametrize(
    "implementation",
    ["reference", *(p for p in fused("masked_prototype_loss") if p.values[0] == "cpp")],
)
def test_agrees_with_scalar_arithmetic(implementation):
    features, masks, labels = inputs(9, 11, 3, dtype=torch.float64)
    masks[0, :3] = torch.tensor([0.0, 1e-8, 1.0])
    losses = kernels.masked_prototype_loss(features, masks, labels, implementation=implementation)
    for actual, expected in zip(losses, scalar_losses(features, masks, labels), strict=True):
        assert_close_to_reference(
            actual, torch.tensor(expected, dtype=torch.float64), torch.float64
        )


def test_class_means_are_sums_by_index():
    features, _, labels = inputs(65, 5, 9, dtype=torch.float64)
    names, index = labels.unique(return_inverse=True)
    sums = torch.zeros(len(names), 5, dtype=torch.float64).index_add(0, index, features)
    expected = (sums / index.bincount().unsqueeze(1))[index]
    assert_close_to_reference(class_means(features, labels), expected, torch.float64)


@pytest.mark.parametrize("implementation", fused("masked_prototype_loss"))
def test_kept_class_means_are_sums_by_index(implementation):
    op = registration.operator("masked_prototype_loss", implementation)
    features, masks, labels = inputs(65, 300, 9, device=device_of(implementation))
    _, index = labels.unique(return_inverse=True)
    sums = torch.zeros(9, 300, dtype=torch.float64, device=features.device)
    sums = sums.index_add(0, index, features.double())
    expected = (sums / index.bincount().unsqueeze(1))[index]
    assert_close_to_reference(op(features, masks, labels)[2], expected, torch.float32)


@pytest.mark.parametrize("implementation", ALL)
def test_the_published_module_computes_the_same(implementation):
    """Mask generator, loss and every gradient as recorded from the published code."""
    device = device_of(implementation)
    with np.load(GOLDEN) as file:
        golden = {key: torch.from_numpy(file[key]).to(device) for key in file}
    weights = {
        key: value.float().requires_grad_() for key, value in golden.items() if key.startswith("w.")
    }
    features = golden["x"].clone().requires_grad_()
    unit = functional.normalize(features, dim=1)
    hidden = functional.linear(unit, weights["w.mlp.0.weight"], weights["w.mlp.0.bias"])
    hidden = functional.layer_norm(
        hidden, hidden.shape[1:], weights["w.mlp.1.weight"], weights["w.mlp.1.bias"]
    )
    hidden = functional.linear(hidden.relu(), weights["w.mlp.3.weight"], weights["w.mlp.3.bias"])
    masks = hidden.sigmoid()
    torch.testing.assert_close(masks, golden["mask"], rtol=1e-5, atol=1e-6)
    alignment, entropy = kernels.masked_prototype_loss(
        features, masks, golden["labels"], implementation=implementation
    )
    torch.testing.assert_close(alignment, golden["align"], rtol=1e-5, atol=0.0)
    torch.testing.assert_close(entropy, golden["entropy"], rtol=1e-5, atol=0.0)
    loss = alignment + 0.1 * entropy
    torch.testing.assert_close(loss, golden["loss"], rtol=1e-5, atol=0.0)
    loss.backward()
    gradients = {key.replace("w.", "g.", 1): weight.grad for key, weight in weights.items()}
    for key, gradient in {"grad_x": features.grad, **gradients}.items():
        scale = float(golden[key].abs().max())
        torch.testing.assert_close(gradient, golden[key], rtol=1e-4, atol=1e-4 * scale, msg=key)


@pytest.mark.parametrize("implementation", ALL)
def test_a_class_of_equal_features_with_open_masks_is_aligned(implementation):
    row = random(1, 40, seed=0, dtype=torch.float32)
    features = torch.cat([row, 3.0 * row, random(1, 40, seed=1, dtype=torch.float32)])
    features = features.to(device_of(implementation))
    labels = torch.tensor([5, 5, -5], device=features.device)
    alignment, entropy = kernels.masked_prototype_loss(
        features, torch.ones_like(features), labels, implementation=implementation
    )
    assert abs(alignment.item()) < 1e-12 and entropy.item() == 0.0


@pytest.mark.parametrize("implementation", ALL)
def test_labels_are_only_names(implementation):
    device = device_of(implementation)
    features, masks, _ = inputs(8, 20, 1, device=device)
    groups = torch.tensor([0, 1, 0, 2, 1, 0, 2, 2], device=device)
    results = []
    for names in ((0, 1, 2), (2, 0, 1), (-(2**62), 2**62, 7)):
        labels = torch.tensor(names, device=device)[groups]
        results.append(run(implementation, features, masks, labels))
    small = torch.tensor((3, 1, 2), device=device, dtype=torch.int16)[groups]
    results.append(run(implementation, features, masks, small))
    for other in results[1:]:
        for name, left, right in zip(NAMES, results[0], other, strict=True):
            assert_close_to_reference(left, right.double(), torch.float32, name=name)


def kinks(device):
    """Rows at every clamp: a zero feature, a class whose mean is zero, a closed and a tiny mask."""
    features, masks, _ = inputs(8, 12, 1, dtype=torch.float64)
    features[0] = 0.0
    features[3] = -features[2]
    features[6] *= 1e-13
    masks[4] = 0.0
    masks[5] = 1e-20
    masks[7, :4] = torch.tensor([0.0, 1e-7, 1e-6, 1.0])
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 0])
    return features.to(device), masks.to(device), labels.to(device)


@pytest.mark.parametrize("implementation", fused("masked_prototype_loss"))
def test_clamped_norms_and_masks(implementation):
    device = device_of(implementation)
    features, masks, labels = kinks(device)
    for dtype in (torch.float64, torch.float32):
        if dtype == torch.float64 and implementation != "cpp":
            continue
        arguments = features.to(dtype), masks.to(dtype), labels
        actual, expected = run(implementation, *arguments), in_reference(*arguments)
        for name, ours, theirs in zip(NAMES[:2], actual[:2], expected[:2], strict=True):
            assert_close_to_reference(ours, theirs, dtype, name=name)
        # Behind a clamp gradients are greater by up to 24 orders of magnitude. Under a closed mask
        # the feature's own gradient cancels, so such rows are judged beside ordinary ones.
        for rows in ([0], [2, 3], [6], [1, 4, 5, 7]):
            for name, ours, theirs in zip(NAMES[2:], actual[2:], expected[2:], strict=True):
                assert_close_to_reference(
                    ours[rows], theirs[rows], dtype, slack=4.0, name=f"{name}, rows {rows}"
                )


@pytest.mark.parametrize("implementation", fused("masked_prototype_loss"))
def test_nan_spoils_its_class_and_no_other(implementation):
    features, masks, labels = inputs(12, 6, 3, device=device_of(implementation))
    features[4, 2] = math.nan
    alignment, entropy, grad_features, grad_masks = run(implementation, features, masks, labels)
    same = labels == labels[4]
    assert alignment.isnan() and entropy.isfinite()
    assert grad_features[same].isnan().all() and grad_features[~same].isfinite().all()
    assert grad_masks[~same].isfinite().all()
    features, masks, labels = inputs(12, 6, 3, device=device_of(implementation))
    masks[4, 2] = math.nan
    alignment, entropy, _, grad_masks = run(implementation, features, masks, labels)
    assert alignment.isnan() and entropy.isnan() and grad_masks[4, 2].isnan()


@pytest.mark.parametrize("implementation", fused("masked_prototype_loss"))
def test_any_strides(implementation):
    features, masks, labels = inputs(7, 30, 3, device=device_of(implementation))
    expected = run(implementation, features, masks, labels)
    actual = run(implementation, strided(features), strided(masks), strided(labels))
    assert all(map(bitwise_equal, actual, expected))
    turned = features.t().contiguous().t()
    assert all(map(bitwise_equal, run(implementation, turned, masks, labels), expected))


@pytest.mark.parametrize("implementation", fused("masked_prototype_loss"))
@pytest.mark.parametrize("size", [(64, 769, 16), (33, 300, 1)])
def test_every_bit_is_the_same_for_any_threads_and_runs(implementation, size):
    arguments = inputs(*size, device=device_of(implementation))
    with threads(1):
        first = run(implementation, *arguments)
    for count in (2, 2, 3):
        with threads(count):
            again = run(implementation, *arguments)
        for name, left, right in zip(NAMES, first, again, strict=True):
            assert bitwise_equal(left, right), f"{name} with {count} threads"


@pytest.mark.parametrize(
    "implementation",
    ["reference", *(p for p in fused("masked_prototype_loss") if p.values[0] == "cpp")],
)
def test_gradcheck(implementation):
    features, masks, labels = inputs(6, 4, 2, dtype=torch.float64)
    masks[0, 0] = 1e-7
    assert torch.autograd.gradcheck(
        lambda f, m: kernels.masked_prototype_loss(f, m, labels, implementation=implementation),
        (features.requires_grad_(), masks.requires_grad_()),
        eps=1e-8,
        atol=1e-6,
    )


@pytest.mark.parametrize("implementation", fused("masked_prototype_loss"))
def test_differentiating_twice_refuses_and_names_the_reference(implementation):
    features, masks, labels = inputs(4, 5, 2, device=device_of(implementation))
    features.requires_grad_()
    losses = kernels.masked_prototype_loss(features, masks, labels, implementation=implementation)
    (grad,) = torch.autograd.grad(losses[0].square(), features, create_graph=True)
    with pytest.raises(RuntimeError, match=r"masked_prototype_loss: .*'reference'"):
        grad.sum().backward()


def test_the_reference_can_be_differentiated_twice():
    features, masks, labels = inputs(4, 3, 2, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda f, m: kernels.masked_prototype_loss(f, m, labels, implementation="reference"),
        (features.requires_grad_(), masks.requires_grad_()),
    )


@pytest.mark.parametrize("implementation", fused("masked_prototype_loss"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(implementation, dtype):
    if dtype == torch.float64 and implementation != "cpp":
        pytest.skip("float64 is left to cpp and the reference")
    features, masks, labels = inputs(6, 5, 2, dtype=dtype, device=device_of(implementation))
    op = registration.operator("masked_prototype_loss", implementation)
    backward = registration.operator("masked_prototype_loss_backward", implementation)
    one = torch.ones((), dtype=dtype, device=features.device)
    torch.library.opcheck(
        backward,
        (one, one, features, masks, labels, *op(features, masks, labels)[2:]),
        test_utils=("test_schema", "test_faketensor"),
    )
    torch.library.opcheck(op, (features.requires_grad_(), masks.requires_grad_(), labels))


GOOD = (torch.zeros(4, 5), torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize(
    ("position", "value", "error", "words"),
    [
        (0, torch.zeros(5), ValueError, r"features: wanted 2 dimensions \[B, D\].*\[5\]"),
        (0, np.zeros((4, 5)), TypeError, "features: wanted a tensor, got ndarray"),
        (0, torch.zeros(4, 5, dtype=torch.int32), TypeError, "features: .*int32"),
        (1, torch.zeros(4, 6), ValueError, r"masks: .*\[4, 5\].*\[4, 6\]"),
        (1, torch.zeros(1, 5), ValueError, r"masks: .*\[4, 5\].*\[1, 5\]"),
        (1, torch.zeros(4, 5, dtype=torch.bool), TypeError, "masks: .*bool"),
        (1, torch.zeros(4, 5, device="meta"), ValueError, "masks: is on meta"),
        (2, torch.zeros(3, dtype=torch.int64), ValueError, "labels: .* 4, got 3"),
        (2, torch.zeros(4, 1, dtype=torch.int64), ValueError, "labels: wanted 1 dim"),
        (2, torch.zeros(4), TypeError, "labels: wanted an integer tensor, got torch.float32"),
        (2, [0, 0, 1, 1], TypeError, "labels: wanted an integer tensor, got list"),
        (2, GOOD[2].to("meta"), ValueError, "labels: is on meta"),
    ],
)
def test_errors_name_the_argument(implementation, position, value, error, words):
    arguments: list[object] = [*GOOD[:position], value, *GOOD[position + 1 :]]
    device = device_of(implementation)
    arguments = [
        a.to(device) if isinstance(a, Tensor) and a.device.type == "cpu" else a for a in arguments
    ]
    with pytest.raises(error, match=words):
        kernels.masked_prototype_loss(*arguments, implementation=implementation)


@pytest.mark.parametrize("implementation", fused("masked_prototype_loss"))
def test_the_bare_operators_check_too(implementation):
    device = device_of(implementation)
    features, masks, labels = inputs(4, 5, 2, device=device)
    forward = registration.operator("masked_prototype_loss", implementation)
    backward = registration.operator("masked_prototype_loss_backward", implementation)
    one = torch.ones((), device=device)
    good = [one, one, features, masks, labels, *forward(features, masks, labels)[2:]]
    backward(*good)
    names = "grad_alignment|grad_entropy|features|masks|labels|means|norms"
    for position in range(7):
        whole = good[position]
        for wrong in (whole.unsqueeze(0), whole.int(), whole[:3] if whole.dim() else None):
            if wrong is None:
                continue
            broken = [*good[:position], wrong, *good[position + 1 :]]
            with pytest.raises((RuntimeError, TypeError, ValueError), match=names):
                backward(*broken)
            if 2 <= position <= 4:
                with pytest.raises((RuntimeError, TypeError, ValueError), match=names):
                    forward(*broken[2:5])


@pytest.mark.parametrize("implementation", fused("masked_prototype_loss"))
def test_compiles_as_one_graph_and_exports(implementation):
    device = device_of(implementation)

    class Loss(torch.nn.Module):
        def forward(self, features: Tensor, masks: Tensor, labels: Tensor):
            return kernels.masked_prototype_loss(
                features, masks, labels, implementation=implementation
            )

    compiled = torch.compile(Loss(), fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((6, 5, 2), (9, 8, 3)):
        features, masks, labels = inputs(*size, device=device)
        expected = run(implementation, features, masks, labels, weights=(1.0, 1.0))
        features.requires_grad_(), masks.requires_grad_()
        losses = compiled(features, masks, labels)
        grads = torch.autograd.grad(sum(losses), (features, masks))
        for name, ours, theirs in zip(NAMES, (*losses, *grads), expected, strict=True):
            assert bitwise_equal(ours, theirs), name
    arguments = features.detach(), masks.detach(), labels
    exported = torch.export.export(Loss(), arguments).module()
    for ours, theirs in zip(exported(*arguments), expected[:2], strict=True):
        assert bitwise_equal(ours, theirs)


@pytest.mark.parametrize("implementation", fused("masked_prototype_loss"))
def test_compiles_by_inductor_with_its_neighbours(implementation):
    def loss(features: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        alignment, entropy = kernels.masked_prototype_loss(
            features * 2.0, logits.sigmoid(), labels, implementation=implementation
        )
        return alignment + 0.1 * entropy

    features, logits, labels = inputs(6, 16, 2, device=device_of(implementation))
    features.requires_grad_(), logits.requires_grad_()
    expected = loss(features, logits, labels)
    actual = torch.compile(loss, fullgraph=True)(features, logits, labels)
    assert_close_to_reference(actual, expected.double(), torch.float32)
    wanted = torch.autograd.grad(expected, (features, logits))
    for ours, theirs in zip(torch.autograd.grad(actual, (features, logits)), wanted, strict=True):
        assert_close_to_reference(ours, theirs.double(), torch.float32)


@pytest.mark.parametrize("implementation", ALL)
def test_autocast_computes_in_float32(implementation):
    device = device_of(implementation)
    features, masks, labels = inputs(16, 48, 4, dtype=torch.bfloat16, device=device)
    expected = in_reference(features, masks, labels)
    leaves = [t.detach().requires_grad_() for t in (features, masks)]
    with torch.autocast(device, dtype=torch.bfloat16):
        losses = kernels.masked_prototype_loss(*leaves, labels, implementation=implementation)
    grads = torch.autograd.grad(1.3 * losses[0] + 0.7 * losses[1], leaves)
    assert_all_close((*losses, *grads), expected, torch.bfloat16)


@pytest.mark.parametrize("implementation", fused("masked_prototype_loss"))
def test_autocast_lifts_half_arguments_of_the_bare_operator(implementation):
    device = device_of(implementation)
    features, masks, labels = inputs(6, 20, 2, dtype=torch.bfloat16, device=device)
    op = registration.operator("masked_prototype_loss", implementation)
    with torch.autocast(device, dtype=torch.bfloat16):
        lifted = op(features, masks, labels)
    assert all(map(bitwise_equal, lifted, op(features.float(), masks.float(), labels)))
    with pytest.raises((RuntimeError, TypeError), match="features"):
        op(features, masks, labels)


@pytest.mark.parametrize("implementation", ALL)
def test_mixed_types_meet_in_the_wider_one(implementation):
    features, masks, labels = inputs(6, 20, 2, device=device_of(implementation))
    results = run(implementation, features, masks.bfloat16(), labels)
    assert [t.dtype for t in results] == [torch.float32] * 3 + [torch.bfloat16]
    if implementation in ("reference", "cpp"):
        results = run(implementation, features, masks.double(), labels)
        assert [t.dtype for t in results] == [
            torch.float64,
            torch.float64,
            torch.float32,
            torch.float64,
        ]
