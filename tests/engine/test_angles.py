"""What the monitor tells of angles and warps, on layers that were set by hand."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from gsalign.engine.angles import IMAGE, AngleMonitor, AngleStatistics
from gsalign.engine.recorder import angle_line
from gsalign.model import GSAlign, ModelConfig


def network(**changes: object) -> GSAlign:
    torch.manual_seed(0)
    return GSAlign(
        ModelConfig.model_validate(
            {
                "image_size": (32, 16),
                "patch_size": 8,
                "width": 24,
                "depth": 2,
                "num_heads": 3,
                "num_identities": 4,
                "ltps": {"hidden": (8, 6)},
                **changes,
            }
        )
    )


def test_points_that_moved_and_positions_beyond_the_border_are_counted():
    model = network()
    monitor = AngleMonitor(model)
    with torch.no_grad():
        model.backbone.ltps["1"].source_points += torch.tensor([0.3, 0.4])
        model.forward_features(torch.randn(3, 3, 32, 16))
    read = monitor.read()
    assert list(read) == ["0", "1"]
    assert read["0"].moved == 0.0 and read["0"].points_std is None
    assert read["1"].moved == pytest.approx(0.5, rel=1e-5)
    # Shifted right and down, all of the right column and of the lowest row is read beyond.
    rows, columns = model.config.grid
    inside = (columns - 1) * sum(2 * row / (rows - 1) - 1 + 0.4 <= 1 for row in range(rows))
    wanted = 1 - inside / (rows * columns)
    assert read["1"].clamped == pytest.approx(wanted)
    assert read["0"].clamped == 0.0


def test_points_of_an_image_of_its_own_are_counted_with_their_spread():
    model = network(ltps={"hidden": (8, 6), "points_per_image": True, "control_points": 9})
    monitor = AngleMonitor(model)
    layer = model.backbone.ltps["1"]
    with torch.no_grad():
        layer.source_points += 0.1
        layer.predictor.hidden.weight.normal_()
        layer.offsets.weight.normal_()
        seen = model.forward_features(torch.randn(5, 3, 32, 16))
    read, own = monitor.read(), seen.offsets[1]
    assert read["0"].moved == read["0"].points_std == 0.0
    spread = (own - own.mean(dim=0)).norm(dim=-1).square().mean().sqrt()
    assert read["1"].points_std == pytest.approx(float(spread), rel=1e-5) and spread > 0.01
    assert read["1"].moved == pytest.approx(
        float((own + 0.1).norm(dim=-1).square().mean().sqrt()), rel=1e-5
    )
    grid = layer.sampling_grid(seen.angles[1], own)
    rows, columns = model.config.grid
    patch = torch.tensor([2 / (columns - 1), 2 / (rows - 1)])
    beyond = (grid.abs() > 1 + 0.1 * patch).any(dim=-1).float().mean()
    assert read["1"].clamped == pytest.approx(float(beyond)) and beyond > 0
    moved, std, clamped = read["1"].moved, read["1"].points_std, read["1"].clamped
    assert f"({moved:.3f}±{std:.3f}, {clamped:.0%})" in angle_line(read)


def test_the_turn_of_the_image_is_read_and_never_saturates(caplog):
    model = network(orientation={"enabled": True})
    monitor = AngleMonitor(model)
    with torch.no_grad():
        direction = model.uprighting(torch.randn(5, 3, 32, 16)).direction
    read = monitor.read()
    wanted = torch.atan2(direction[:, 1], direction[:, 0])
    assert list(read) == [IMAGE]
    assert read[IMAGE].mean == pytest.approx(float(wanted.mean()), rel=1e-5)
    turned = AngleStatistics(mean=0.0, std=3.0, absolute=3.0, full_circle=True)
    limited = AngleStatistics(mean=0.0, std=0.0, absolute=math.pi / 2)
    assert turned.state == "alive" and limited.state == "saturated"
    with caplog.at_level(logging.WARNING):
        monitor.warn({IMAGE: turned, "0": limited})
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "LTPS angles have saturated in layer 0"
    ]
    line = angle_line({IMAGE: turned, "0": limited})
    assert "image: +0.0±171.9  0: +0.0±0.0 (0.000, 0%)" in line
