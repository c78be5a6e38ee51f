"""ModelConfig: what it refuses, and what it derives."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from gsalign.model import LtpsConfig, ModelConfig


def test_defaults_are_the_published_network():
    config = ModelConfig()
    assert config.grid == (16, 8)
    assert config.ltps_layers == tuple(range(12))
    assert config.ltps.control_points == 4 and config.ltps.eta == 0.1
    assert config.losses.mask == 10 and config.losses.deformation == 0.5


def test_json_round_trip():
    config = ModelConfig(ltps={"layers": [2, 0]}, dam={"enabled": False}, pretrained="vit.pth")
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config
    assert config.ltps_layers == (0, 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": (250, 128)}, "250x128 is not a multiple of patch_size 16"),
        ({"num_heads": 7}, "width 768 is not a multiple of num_heads 7"),
        ({"ltps": {"control_points": 5}}, "square number"),
        ({"ltps": {"control_points": 1}}, "square number"),
        ({"ltps": {"layers": [12]}}, r"names \[12\], but depth 12"),
        ({"ltps": {"layers": [-1]}}, r"names \[-1\]"),
        ({"ltps": {"layers": [1, 1]}}, "twice"),
        ({"ltps": {"eta": float("nan")}}, "finite"),
        ({"image_size": (16, 128)}, "2x2 patches"),
        ({"losses": {"mask": -1}}, "greater than or equal to 0"),
        ({"drop_path": 1.0}, "less than 1"),
        ({"depth": 0}, "greater than 0"),
        ({"colour": "red"}, "colour"),
        ({"ltps": {"spline": 3}}, "spline"),
    ],
)
def test_refusals(values, message):
    with pytest.raises(ValidationError, match=message):
        ModelConfig(**values)


def test_one_row_of_patches_is_fine_without_ltps():
    assert ModelConfig(image_size=(16, 128), ltps={"layers": []}).grid == (1, 8)


def test_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        LtpsConfig().eta = 0.5
