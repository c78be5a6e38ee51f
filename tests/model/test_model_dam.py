"""DAM by itself: pooling, channel masks, and the extension to spatial part masks."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from gsalign.model import DamConfig, ModelConfig
from gsalign.model.dam import DAM, patch_mean

IDENTITIES = torch.tensor([0, 0, 1, 2])


def slow_loss(dam: DAM, features: torch.Tensor, classes: list) -> torch.Tensor:
    alignment, entropy = 0.0, 0.0
    for feature, own in zip(features, classes, strict=True):
        unit = normalize(feature, dim=0)
        mask = dam.mask(unit)
        alike = [f for f, c in zip(features, classes, strict=True) if c == own]
        centre = normalize(torch.stack(alike).mean(dim=0), dim=0)
        alignment += (unit - normalize(centre * mask, dim=0)).square().mean()
        entropy += -(mask * mask.log()).mean()
    return (alignment + dam.entropy_weight * entropy) / len(classes)


def test_patch_mean():
    patches = torch.randn(3, 12, 8)
    torch.testing.assert_close(patch_mean(patches), patches.mean(dim=1))


def test_masks_start_near_one_half():
    dam = DAM(64, DamConfig())
    masks = dam.mask(normalize(torch.randn(16, 64), dim=1))
    assert 0 < masks.min() and masks.max() < 1
    assert (masks - 0.5).abs().mean() < 0.1


def test_one_part_against_a_loop():
    dam = DAM(8, DamConfig(entropy_weight=0.3)).double()
    patches = torch.randn(4, 12, 8, dtype=torch.float64)
    wanted = slow_loss(dam, patches.mean(dim=1), IDENTITIES.tolist())
    torch.testing.assert_close(dam(patches, IDENTITIES), wanted)


def test_parts_against_a_loop():
    dam = DAM(8, DamConfig(parts=3)).double()
    torch.nn.init.normal_(dam.parts.logits.weight)
    patches = torch.randn(4, 12, 8, dtype=torch.float64)
    features, classes = [], []
    for image, identity in zip(patches, IDENTITIES.tolist(), strict=True):
        weights = (image @ dam.parts.logits.weight.T + dam.parts.logits.bias).softmax(dim=1)
        for part in range(3):
            weight = weights[:, part]
            mean = (weight.unsqueeze(1) * image).sum(dim=0) / weight.sum()
            features.append(normalize(mean, dim=0) * weight.max())
            classes.append((identity, part))
    wanted = slow_loss(dam, torch.stack(features), classes)
    torch.testing.assert_close(dam(patches, IDENTITIES), wanted)


def test_part_masks_share_every_patch():
    dam = DAM(8, DamConfig(parts=3))
    masks = dam.parts.masks(torch.randn(4, 12, 8))
    assert masks.shape == (4, 3, 12)
    torch.testing.assert_close(masks.sum(dim=1), torch.ones(4, 12))


@pytest.mark.parametrize("parts", [1, 3])
def test_loss_is_float32_under_autocast(parts):
    dam = DAM(8, DamConfig(parts=parts))
    patches = torch.randn(4, 12, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = dam(patches.bfloat16(), IDENTITIES)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, dam(patches, IDENTITIES), rtol=0.02, atol=1e-3)


def test_parts_train_with_the_network(tiny_config, make_model, make_batch):
    config = ModelConfig.model_validate({**tiny_config.model_dump(), "dam": {"parts": 3}})
    model = make_model(config).train()
    terms = model.losses(*make_batch(config))
    sum(terms.values()).backward()
    unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused
    assert model.dam.parts.logits.weight.grad.abs().max() > 0


def test_parts_compile_in_one_graph():
    dam = DAM(8, DamConfig(parts=3))
    patches = torch.randn(4, 12, 8)
    compiled = torch.compile(dam, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(patches, IDENTITIES), dam(patches, IDENTITIES))
