"""DAM by itself: pooling, channel masks, and prototypes per body part."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from gsalign.model import DamConfig
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
    dam = DAM(8, DamConfig()).double()
    patches = torch.randn(4, 12, 8, dtype=torch.float64)
    logits = torch.randn(4, 4, 12, dtype=torch.float64)
    features, classes = [], []
    weights = logits.softmax(dim=1)[:, 1:]
    for image, masks, identity in zip(patches, weights, IDENTITIES.tolist(), strict=True):
        for part, mask in enumerate(masks):
            mean = (mask.unsqueeze(1) * image).sum(dim=0) / mask.sum()
            features.append(normalize(mean, dim=0) * mask.max())
            classes.append((identity, part))
    wanted = slow_loss(dam, torch.stack(features), classes)
    wanted = wanted + slow_loss(dam, patches.mean(dim=1), IDENTITIES.tolist())
    torch.testing.assert_close(dam(patches, IDENTITIES, logits), wanted)


@pytest.mark.parametrize("parts", [0, 3])
def test_loss_is_float32_under_autocast(parts):
    dam = DAM(8, DamConfig())
    patches = torch.randn(4, 12, 8)
    logits = torch.randn(4, parts + 1, 12) if parts else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = dam(patches.bfloat16(), IDENTITIES, logits)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, dam(patches, IDENTITIES, logits), rtol=0.02, atol=1e-3)


def test_compiles_in_one_graph():
    dam = DAM(8, DamConfig())
    patches, logits = torch.randn(4, 12, 8), torch.randn(4, 4, 12)
    compiled = torch.compile(dam, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(patches, IDENTITIES, logits), dam(patches, IDENTITIES, logits)
    )
