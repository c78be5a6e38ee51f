"""Each loss against a slow loop, and at its edges."""

from __future__ import annotations

import math

import pytest
import torch

from gsalign.model import losses

IDENTITIES = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])


def slow_triplet(features, identities):
    terms = []
    for i, anchor in enumerate(features):
        distance = [float((anchor - other).norm()) for other in features]
        same = [d for j, d in enumerate(distance) if identities[j] == identities[i]]
        other = [d for j, d in enumerate(distance) if identities[j] != identities[i]]
        terms.append(math.log1p(math.exp(max(same) - min(other))))
    return sum(terms) / len(terms)


def test_triplet_against_a_loop():
    features = 0.3 * torch.randn(8, 5, dtype=torch.float64) + 4.0
    ours = losses.batch_hard_triplet(features, IDENTITIES)
    assert float(ours) == pytest.approx(slow_triplet(features, IDENTITIES), rel=1e-7)


def test_triplet_gradient():
    features = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: losses.batch_hard_triplet(f, IDENTITIES), features)


def test_triplet_of_single_images_has_no_positive_distance():
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    loss = losses.batch_hard_triplet(features, torch.tensor([0, 1]))
    assert float(loss.detach()) == pytest.approx(math.log1p(math.exp(-5.0)), rel=1e-4)
    loss.backward()
    assert torch.isfinite(features.grad).all()


def test_triplet_without_negatives_is_zero_and_flat():
    features = torch.randn(3, 4, requires_grad=True)
    loss = losses.batch_hard_triplet(features, torch.zeros(3, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(features.grad, torch.zeros_like(features))


def test_triplet_of_equal_features_has_a_finite_gradient():
    features = torch.ones(4, 3, requires_grad=True)
    loss = losses.batch_hard_triplet(features, torch.tensor([0, 0, 1, 1]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(math.log(2))
    assert torch.isfinite(features.grad).all()


def test_triplet_far_from_the_origin_keeps_its_digits():
    near = torch.randn(8, 16)
    far = near + 1000.0
    torch.testing.assert_close(
        losses.batch_hard_triplet(far, IDENTITIES),
        losses.batch_hard_triplet((far - 1000.0), IDENTITIES),
        rtol=1e-4,
        atol=0,
    )


def test_triplet_does_not_overflow():
    features = torch.tensor([[0.0], [1e4], [1.0], [2e4]])
    loss = losses.batch_hard_triplet(features, torch.tensor([0, 0, 1, 1]))
    assert torch.isfinite(loss) and loss > 1e3


def test_classification_averages_over_losses_that_are_not_zero():
    logits = torch.tensor([[2.0, 1.0], [200.0, 0.0], [0.0, 300.0], [0.0, 1.0]])
    labels = torch.tensor([0, 0, 1, 0])
    wanted = (math.log1p(math.exp(-1.0)) + math.log1p(math.exp(1.0))) / 2
    assert float(losses.classification(logits, labels)) == pytest.approx(wanted, rel=1e-6)


def test_classification_of_perfect_logits_is_zero():
    logits = torch.tensor([[200.0, 0.0], [0.0, 300.0]], requires_grad=True)
    loss = losses.classification(logits, torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.isfinite(logits.grad).all()


def test_orthogonality_and_deformation():
    feature = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    view = torch.tensor([[-2.0, 0.0], [1.0, -1.0]])
    assert float(losses.orthogonality(feature, view)) == pytest.approx(0.5)
    angles = torch.tensor([[0.1, -0.3], [0.5, 0.0], [0.0, 0.0]])
    assert float(losses.deformation(angles)) == pytest.approx(0.2 + 0.25)
    assert float(losses.deformation(torch.zeros(0, 4))) == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_features_are_summed_in_float32(dtype):
    feature, view = torch.randn(8, 64).to(dtype), torch.randn(8, 64).to(dtype)
    pairs = [
        (losses.batch_hard_triplet, (feature, IDENTITIES)),
        (losses.classification, (feature, IDENTITIES)),
        (losses.orthogonality, (feature, view)),
    ]
    for function, arguments in pairs:
        wide = [a.float() if a.is_floating_point() else a for a in arguments]
        assert function(*arguments).dtype == torch.float32
        assert torch.equal(function(*arguments), function(*wide))
