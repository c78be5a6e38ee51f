"""LTPS by itself: control points, angles, the spline's constants, the warp."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

from gsalign.model import LtpsConfig
from gsalign.model.ltps import LTPS, PREFIX, AnglePredictor, control_grid
from gsalign_kernels import backends

SIZE = (4, 3)


def tokens(batch: int = 2, width: int = 8, **kwargs) -> torch.Tensor:
    return torch.randn(batch, PREFIX + SIZE[0] * SIZE[1], width, **kwargs)


def zero_angle(ltps: LTPS) -> LTPS:
    torch.nn.init.zeros_(ltps.predictor.out.weight)
    torch.nn.init.zeros_(ltps.predictor.out.bias)
    return ltps


@pytest.mark.parametrize("count", [4, 9, 16, 25, 36])
def test_control_points_are_column_major(count):
    points = control_grid(count)
    side = math.isqrt(count)
    line = torch.linspace(-1, 1, side, dtype=torch.float64)
    for i in range(side):
        for j in range(side):
            assert torch.allclose(points[i * side + j], torch.stack([line[i], line[j]]))


@pytest.mark.parametrize("count", [4, 9, 16, 25, 36])
def test_start_is_the_identity_warp(count):
    ltps = zero_angle(LTPS(8, SIZE, LtpsConfig(control_points=count, eta=0.3))).double()
    given = tokens(dtype=torch.float64)
    warped, angle, _ = ltps(given)
    assert torch.equal(angle, torch.zeros(2, dtype=torch.float64))
    assert torch.equal(warped[:, :PREFIX], given[:, :PREFIX])
    # The source points are float32 numbers, and a third is none of those.
    torch.testing.assert_close(warped[:, PREFIX:], 1.3 * given[:, PREFIX:], rtol=1e-6, atol=1e-6)


def test_angle_is_bounded_and_starts_near_zero():
    ltps = LTPS(8, SIZE, LtpsConfig())
    assert ltps.angle(tokens(64)).abs().max() < 0.05
    torch.nn.init.constant_(ltps.predictor.out.bias, 100.0)
    torch.testing.assert_close(ltps.angle(tokens()), torch.full((2,), math.pi / 2))


def test_angle_formula():
    predictor = AnglePredictor(8, (6, 5)).double()
    patch_map = torch.randn(3, 8, 4, 3, dtype=torch.float64)
    windows = torch.nn.functional.unfold(patch_map, 3, padding=1)
    kernel, bias = predictor.conv.weight.flatten(1), predictor.conv.bias
    response = (torch.einsum("ok,bkn->bno", kernel, windows) + bias).clamp(min=0).mean(dim=1)
    hidden = (response @ predictor.hidden.weight.T + predictor.hidden.bias).clamp(min=0)
    wanted = math.pi / 2 * torch.tanh(hidden @ predictor.out.weight.T + predictor.out.bias)
    given = torch.cat([torch.full((3, PREFIX, 8), math.nan), patch_map.flatten(2).mT], dim=1)
    torch.testing.assert_close(predictor(given.double(), (4, 3)), wanted[:, 0])


@pytest.mark.parametrize("count", [4, 16])
def test_forward_reads_where_the_grid_says(count):
    ltps = LTPS(8, SIZE, LtpsConfig(control_points=count, eta=0.5)).double()
    with torch.no_grad():
        ltps.source_points += 0.2 * torch.randn_like(ltps.source_points)
        ltps.predictor.out.bias.fill_(0.7)
    given = tokens(dtype=torch.float64)
    warped, angle, _ = ltps(given)
    assert angle.abs().min() > 0.5
    patch_map = given[:, PREFIX:].transpose(1, 2).unflatten(2, SIZE)
    read = torch.nn.functional.grid_sample(
        patch_map, ltps.sampling_grid(angle), align_corners=True, padding_mode="border"
    )
    wanted = given[:, PREFIX:] + 0.5 * read.flatten(2).transpose(1, 2)
    torch.testing.assert_close(warped[:, PREFIX:], wanted)


def test_rotation_turns_x_towards_y():
    ltps = LTPS(8, (3, 3), LtpsConfig())
    grid = ltps.sampling_grid(torch.tensor([math.pi / 2]))
    # The right-hand edge's middle, (1, 0), reads at (0, 1): the middle of the lower edge.
    torch.testing.assert_close(grid[0, 1, 2], torch.tensor([0.0, 1.0]), rtol=0, atol=1e-6)


def test_constants_follow_the_network_without_losing_digits():
    ltps = LTPS(8, SIZE, LtpsConfig(control_points=9))
    assert "basis" not in ltps.state_dict()
    exact = LTPS(8, SIZE, LtpsConfig(control_points=9)).double().basis
    assert ltps.basis.dtype == torch.float32
    ltps.to(torch.bfloat16)
    assert ltps.source_points.dtype == torch.bfloat16 and ltps.basis.dtype == torch.float32
    ltps.double()
    assert torch.equal(ltps.basis, exact)


@pytest.mark.parametrize("choice", ["cuda", "triton"])
def test_constants_are_made_whatever_kernels_are_asked_for(choice, monkeypatch):
    plain = LTPS(8, (4, 3), LtpsConfig())
    monkeypatch.setattr(backends, "_environment", choice)
    asked = LTPS(8, (4, 3), LtpsConfig())
    assert backends.choice_in_force() == choice
    assert torch.equal(asked.basis, plain.basis)


def test_constants_survive_a_start_on_meta():
    with torch.device("meta"):
        ltps = LTPS(8, SIZE, LtpsConfig())
    assert ltps.source_points.is_meta and ltps.basis.is_meta
    ltps.to_empty(device="cpu")
    assert torch.equal(ltps.basis, LTPS(8, SIZE, LtpsConfig()).basis)


def test_constants_follow_assigned_weights():
    with torch.device("meta"):
        ltps = LTPS(8, SIZE, LtpsConfig())
    given = LTPS(8, SIZE, LtpsConfig()).double()
    ltps.load_state_dict(given.state_dict(), assign=True)
    assert torch.equal(ltps.basis, given.basis)
    assert torch.equal(pickle.loads(pickle.dumps(ltps)).basis, given.basis)


def test_bfloat16_autocast_keeps_angles_in_float32():
    ltps = LTPS(8, SIZE, LtpsConfig())
    given = tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        warped, angle, _ = ltps(given)
    assert angle.dtype == torch.float32 and warped.dtype == torch.float32
    torch.testing.assert_close(angle, ltps.angle(given), rtol=0.02, atol=1e-3)


def test_gradients_reach_everything():
    ltps = LTPS(4, SIZE, LtpsConfig(hidden=(3, 3))).double()
    with torch.no_grad():
        ltps.source_points.mul_(0.83)
        ltps.predictor.out.bias.fill_(0.3)
    given = tokens(1, 4, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in ltps.named_parameters()]

    def run(given, *parameters):
        return torch.func.functional_call(
            ltps, dict(zip(names, parameters, strict=True)), (given,)
        )[0]

    parameters = tuple(p.detach().clone().requires_grad_() for p in ltps.parameters())
    assert torch.autograd.gradcheck(run, (given, *parameters), atol=1e-6)
