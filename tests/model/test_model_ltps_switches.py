"""Ways to keep LTPS alive: hinge, direction, rigid turns, equivariance; each off by default.

Points of an image's own and the weight that rises: test_model_ltps_points.py.
"""

from __future__ import annotations

import math

import pytest
import torch

from gsalign.engine.angles import AngleMonitor
from gsalign.model import LtpsConfig, ModelConfig, losses
from gsalign.model.equivariance import EVERY, equivariance_costs, turned
from gsalign.model.ltps import LTPS, PREFIX, AnglePredictor, rotated
from gsalign.model.ltps_direction import SOFTENING, angle_of


def change(config: ModelConfig, **values) -> ModelConfig:
    return ModelConfig.model_validate({**config.model_dump(), **values})


def tokens(size: tuple[int, int], batch: int = 3, width: int = 8, **kwargs) -> torch.Tensor:
    return torch.randn(batch, PREFIX + size[0] * size[1], width, **kwargs)


def with_points(size: tuple[int, int], shift: float = 0.2, **config) -> LTPS:
    """A float64 layer whose points are off the grid."""
    ltps = LTPS(8, size, LtpsConfig(hidden=(4, 3), eta=0.5, **config)).double()
    with torch.no_grad():
        ltps.source_points += shift * torch.randn_like(ltps.source_points)
    return ltps


def test_hinge_counts_what_exceeds_it():
    angles = torch.tensor([[0.1, -0.7], [0.5, 1.5]], dtype=torch.float64, requires_grad=True)
    term = losses.deformation(angles, 0.5)
    torch.testing.assert_close(term, term.new_tensor(0.2 / 2 + 1.0 / 2))
    term.backward()
    assert torch.equal(angles.grad, angles.new_tensor([[0.0, -0.5], [0.0, 0.5]]))


def test_hinge_reaches_the_loss_of_the_network(tiny_config, make_model, make_batch):
    model = make_model(change(tiny_config, losses={"deformation": 2.0, "deformation_hinge": 0.01}))
    batch = make_batch(tiny_config)
    angles = model.forward_features(batch[0]).angles
    wanted = 2 * (angles.abs() - 0.01).clamp(min=0).mean(dim=1).sum()
    assert 0 < wanted < 2 * angles.abs().mean(dim=1).sum()
    torch.testing.assert_close(model.losses(*batch)["deformation"], wanted)


def test_angle_of_is_atan2_all_round():
    wanted = torch.linspace(-3.1, 3.1, 63, dtype=torch.float64)
    vectors = 3 * torch.stack([wanted.cos(), wanted.sin()], dim=-1)
    torch.testing.assert_close(angle_of(vectors), wanted)
    vectors.requires_grad_()
    (mine,) = torch.autograd.grad(angle_of(vectors).sum(), vectors)
    (exact,) = torch.autograd.grad(torch.atan2(vectors[:, 1], vectors[:, 0]).sum(), vectors)
    torch.testing.assert_close(mine, exact, rtol=2 * SOFTENING, atol=0)


@pytest.mark.parametrize("length", [0.0, 1e-30, 1e-6, 0.01, 0.3, 1e10])
def test_angle_of_has_a_bounded_gradient(length):
    vectors = torch.tensor([[-length, length]], requires_grad=True)
    (gradient,) = torch.autograd.grad(angle_of(vectors).sum(), vectors)
    assert gradient.isfinite().all()
    assert gradient.norm() <= 1.001 * 0.5 / math.sqrt(SOFTENING)


def test_direction_starts_near_zero_and_reaches_the_full_circle():
    predictor = AnglePredictor(8, (6, 5), "direction")
    assert predictor(tokens((4, 3), 64), (4, 3)).abs().max() < 0.05
    with torch.no_grad():
        predictor.out.bias.copy_(torch.tensor([-1.0, -0.1]))
    angle = predictor(tokens((4, 3)), (4, 3))
    wanted = torch.full((3,), math.atan2(-0.1, -1.0))
    torch.testing.assert_close(angle, wanted, rtol=0, atol=0.05)


def test_direction_trains_and_is_never_called_saturated(tiny_config, make_model, make_batch):
    config = change(tiny_config, ltps={"hidden": (8, 6), "angle": "direction"})
    model = make_model(config)
    with torch.no_grad():
        model.backbone.ltps["0"].predictor.out.bias.copy_(torch.tensor([-1.0, 0.1]))
    monitor = AngleMonitor(model)
    sum(model.losses(*make_batch(config)).values()).backward()
    for ltps in model.backbone.ltps.values():
        assert all(p.grad.isfinite().all() and p.grad.any() for p in ltps.parameters())
    read = monitor.read()
    assert read["0"].absolute > 2.5 and read["0"].state == "alive"


def test_turned_by_a_quarter_is_rot90():
    images = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    quarter = torch.full((2,), math.pi / 2, dtype=torch.float64)
    torch.testing.assert_close(turned(images, quarter), images.rot90(1, (2, 3)))
    torch.testing.assert_close(turned(images, torch.zeros_like(quarter)), images)


def test_turned_is_rigid_in_pixels():
    images = torch.zeros(1, 1, 17, 9, dtype=torch.float64)
    images[0, 0, 8, 4 + 3] = 1.0  # three pixels right of the middle
    up = turned(images, torch.tensor([math.pi / 2], dtype=torch.float64))
    wanted = torch.zeros_like(images)
    wanted[0, 0, 8 - 3, 4] = 1.0
    torch.testing.assert_close(up, wanted)


def test_costs_are_circular():
    angles = torch.tensor([[0.5, 1.0, -3.0], [0.5, 1.0, 0.2]], dtype=torch.float64)
    turns = torch.tensor([0.3, -3.0, 2.0], dtype=torch.float64)
    own = angles.sum(dim=0)
    right = (own - turns + torch.tensor([0.0, 2 * math.pi, 0.0])).unsqueeze(0)
    torch.testing.assert_close(equivariance_costs(angles, right, turns), torch.zeros_like(turns))
    opposite = equivariance_costs(angles, right + math.pi, turns)
    torch.testing.assert_close(opposite, torch.full_like(turns, 2.0))


def test_costs_are_0_where_the_warp_reads_the_same():
    """The sign: LTPS undoes a turn of the map by the angle that the loss asks for."""
    size, turn = (4, 4), math.pi / 2
    ltps = with_points(size, shift=0.0)
    given = tokens(size, dtype=torch.float64)
    patch_map = given[:, PREFIX:].transpose(1, 2).unflatten(2, size)
    turns = torch.full((3,), turn, dtype=torch.float64)
    other = given.clone()
    other[:, PREFIX:] = turned(patch_map, turns).flatten(2).transpose(1, 2)
    own = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    read = ltps.warp(given, own) - given
    torch.testing.assert_close(ltps.warp(other, own - turn) - other, read)
    costs = equivariance_costs(own.unsqueeze(0), (own - turn).unsqueeze(0), turns)
    torch.testing.assert_close(costs, torch.zeros_like(costs))


def test_equivariance_looks_at_a_share_once_more_and_only_if_asked(
    tiny_config, make_model, make_batch
):
    batch = make_batch(tiny_config, 6)
    seen = {}
    for weight in (0.0, 2.0):
        torch.manual_seed(5)
        model = make_model(change(tiny_config, losses={"equivariance": weight}))
        monitor = AngleMonitor(model)
        calls = seen.setdefault(weight, [])
        model.backbone.register_forward_hook(
            lambda module, given, result, calls=calls: calls.append(result[1])
        )
        terms = model.losses(*batch)
        assert ("equivariance" in terms) == bool(weight)
        mean = monitor.read()["0"].mean
        assert mean == pytest.approx(float(calls[-1][0].detach().mean()), rel=1e-5)
    assert [angles.shape[1] for angles in seen[0.0]] == [6]
    assert [angles.shape[1] for angles in seen[2.0]] == [math.ceil(6 / EVERY), 6]
    torch.testing.assert_close(seen[0.0][0], seen[2.0][1])
    assert 0 < terms["equivariance"] <= 4.0
    terms["equivariance"].backward()
    for ltps in model.backbone.ltps.values():
        assert ltps.predictor.out.weight.grad.any()


def test_equivariance_counts_only_with_ltps(tiny_config, make_model, make_batch):
    config = change(tiny_config, ltps={"layers": ()}, losses={"equivariance": 1.0})
    assert "equivariance" not in make_model(config).losses(*make_batch(config))


@pytest.mark.parametrize("count", [4, 9])
def test_aspect_true_is_the_fused_warp_on_a_square_map(count):
    size = (4, 4)
    fused = with_points(size, control_points=count)
    rigid = with_points(size, control_points=count, aspect_true=True)
    rigid.load_state_dict(fused.state_dict())
    given = tokens(size, dtype=torch.float64)
    angle = torch.tensor([0.0, 1.1, -2.5], dtype=torch.float64)
    torch.testing.assert_close(rigid.warp(given, angle), fused.warp(given, angle))


def test_aspect_true_is_the_fused_warp_at_angle_zero():
    size = (6, 3)
    fused, rigid = with_points(size), with_points(size, aspect_true=True)
    rigid.load_state_dict(fused.state_dict())
    given = tokens(size, dtype=torch.float64)
    nothing = torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(rigid.warp(given, nothing), fused.warp(given, nothing))
    other = nothing + 0.5
    assert (rigid.warp(given, other) - fused.warp(given, other)).abs().max() > 0.1


def test_aspect_true_turns_patches_rigidly():
    size = (5, 3)
    ltps = with_points(size, shift=0.0, aspect_true=True)
    given = tokens(size, 1, dtype=torch.float64)
    quarter = torch.tensor([math.pi / 2], dtype=torch.float64)
    read = (ltps.warp(given, quarter) - given)[:, PREFIX:].unflatten(1, size) / 0.5
    patches = given[:, PREFIX:].unflatten(1, size)
    # The middle 3 x 3 patches are a square, and turn as one; elsewhere the border goes on.
    torch.testing.assert_close(read[:, 1:4], patches[:, 1:4].rot90(1, (1, 2)))


def test_aspect_true_reads_where_its_grid_says():
    size = (5, 3)
    ltps = with_points(size, aspect_true=True, control_points=9)
    given = tokens(size, dtype=torch.float64)
    angle = torch.tensor([0.4, -1.3, 3.0], dtype=torch.float64)
    read = torch.nn.functional.grid_sample(
        given[:, PREFIX:].transpose(1, 2).unflatten(2, size),
        ltps.sampling_grid(angle),
        align_corners=True,
        padding_mode="border",
    )
    wanted = given[:, PREFIX:] + 0.5 * read.flatten(2).transpose(1, 2)
    torch.testing.assert_close(ltps.warp(given, angle)[:, PREFIX:], wanted)


def test_aspect_true_has_gradients_like_differences():
    size = (4, 3)
    ltps = with_points(size, shift=0.05, aspect_true=True)
    given = tokens(size, 1, 2, dtype=torch.float64, requires_grad=True)
    angle = torch.tensor([0.37], dtype=torch.float64, requires_grad=True)

    def run(given, angle, points):
        return torch.func.functional_call(
            _Warp(ltps), {"ltps.source_points": points}, (given, angle)
        )

    points = (0.83 * ltps.source_points).detach().requires_grad_()
    assert torch.autograd.gradcheck(run, (given, angle, points), atol=1e-6)


class _Warp(torch.nn.Module):
    def __init__(self, ltps: LTPS) -> None:
        super().__init__()
        self.ltps = ltps

    def forward(self, given, angle):
        return self.ltps.warp(given, angle)


def test_aspect_true_has_the_weights_of_the_published_layer_and_its_constants_follow():
    rigid = LTPS(8, (5, 3), LtpsConfig(aspect_true=True))
    assert rigid.state_dict().keys() == LTPS(8, (5, 3), LtpsConfig()).state_dict().keys()
    assert rigid.control.dtype == torch.float32
    assert rigid.double().control.dtype == torch.float64
    with torch.device("meta"):
        empty = LTPS(8, (5, 3), LtpsConfig(aspect_true=True))
    empty.load_state_dict(rigid.state_dict(), assign=True)
    assert torch.equal(empty.control, rigid.control)


def test_aspect_true_keeps_its_points_in_float32_under_autocast():
    rigid = with_points((5, 3), aspect_true=True).float()
    given, angle = tokens((5, 3)), torch.tensor([0.4, -1.3, 1.0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        warped = rigid.warp(given, angle)
    torch.testing.assert_close(warped, rigid.warp(given, angle))


def test_rotated_by_an_aspect_keeps_lengths():
    points = torch.randn(7, 2, dtype=torch.float64)
    angle = torch.tensor([0.4, 2.0], dtype=torch.float64)
    scale = torch.tensor([0.5, 1.0], dtype=torch.float64)
    turned_points = rotated(points, angle, 0.5)
    lengths = (turned_points * scale).norm(dim=-1)
    torch.testing.assert_close(lengths, (points * scale).norm(dim=-1).expand(2, -1))
