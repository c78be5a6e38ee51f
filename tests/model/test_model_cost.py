"""Parameters and multiply-accumulates, against those counted for the published network."""

from __future__ import annotations

import pytest
import torch

from gsalign.model import GSAlign, ModelConfig
from gsalign.model.cost import count_cost

# Of two heads each with a layer of 768 x 768 and its norm, which the published code never trains.
DEAD = 2 * (768 * 768 + 2 * 768)


def test_the_published_network():
    costs = count_cost(ModelConfig())
    assert costs["total"].parameters + DEAD == 111_671_148
    assert costs["ViT blocks"].parameters == 85_054_464
    assert costs["LTPS"].parameters == 21_633_132
    assert costs["DAM (training)"].parameters == 1_182_720
    # Counted by another tool, which counts a thousandth more.
    assert costs["total"].all_tokens / 1e9 == pytest.approx(14.164, rel=2e-3)
    assert costs["ViT blocks"].all_tokens / 1e9 == pytest.approx(11.365, rel=2e-3)
    assert costs["LTPS"].all_tokens / 1e9 == pytest.approx(2.723, rel=3e-3)
    assert costs["total"].macs < costs["total"].all_tokens


def test_products_by_hand():
    config = ModelConfig.model_validate(
        {
            "image_size": (32, 16), "patch_size": 8, "width": 16, "depth": 1, "num_heads": 2,
            "num_identities": 4, "ltps": {"hidden": (8, 4)}, "parts": 2,
            "part_cells": 4,
            "orientation": {"enabled": True, "rings": 4, "rays": 8, "width": 5, "kernels": (3,)},
        }
    )  # fmt: skip
    costs = count_cost(config)
    tokens, patches, width = 10, 8, 16
    assert costs["patch embedding"].macs == patches * 3 * 8 * 8 * width
    # A convolution of three colours by ring, a weight for every channel, the first harmonic.
    assert costs["alignment"].macs == 8 * (3 * 4 * 3 * 5 + 5 + 2)
    linear = tokens * width * (3 * width + width + 2 * 4 * width)
    assert costs["ViT blocks"].macs == linear + 2 * tokens * tokens * width
    assert costs["LTPS"].macs == pytest.approx(patches * width * 9 * 8 + 8 * 4 + 4, rel=0.02)
    with torch.device("meta"):
        wanted = sum(parameter.numel() for parameter in GSAlign(config).parameters())
    assert costs["total"].parameters == wanted
    assert sum(cost.parameters for name, cost in costs.items() if name != "total") == wanted
