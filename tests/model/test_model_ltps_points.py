"""Control points of every image's own: the head, its bound, and all that reads through them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from gsalign.engine.loading import load_network
from gsalign.errors import CheckpointError
from gsalign.model import GSAlign, LtpsConfig, ModelConfig, load_model, save_weights
from gsalign.model.ltps import LTPS, PREFIX
from gsalign.model.ltps_points import REACH, PointOffsets
from gsalign.model.transfer import transfer_weights

SIZE = (5, 3)


def with_points(config: ModelConfig, **ltps) -> ModelConfig:
    return ModelConfig.model_validate(
        {**config.model_dump(), "ltps": {"hidden": (8, 6), "points_per_image": True, **ltps}}
    )


def tokens(batch: int = 3, width: int = 8) -> Tensor:
    return torch.randn(batch, PREFIX + SIZE[0] * SIZE[1], width, dtype=torch.float64)


def layer(**config) -> LTPS:
    """A float64 layer whose images have points and angles of their own."""
    config = {"hidden": (4, 3), "eta": 0.5, "points_per_image": True, **config}
    ltps = LTPS(8, SIZE, LtpsConfig(**config)).double()
    with torch.no_grad():
        ltps.source_points += 0.1 * torch.randn_like(ltps.source_points)
        ltps.predictor.hidden.weight.normal_()
        ltps.predictor.hidden.bias.fill_(0.5)
        ltps.predictor.out.weight.normal_()
        if ltps.offsets is not None:
            ltps.offsets.weight.normal_()
            ltps.offsets.bias.normal_(std=0.1)
    return ltps


def test_it_starts_as_without_with_the_same_weights_and_random_numbers(tiny_config, make_batch):
    made, left = [], []
    for config in (tiny_config, with_points(tiny_config)):
        torch.manual_seed(4)
        made.append(GSAlign(config).double())
        left.append(torch.rand(3))
    plain, own = made
    assert torch.equal(*left)
    new = {f"backbone.ltps.{i}.offsets.{name}" for i in (0, 1) for name in ("weight", "bias")}
    assert own.state_dict().keys() - plain.state_dict().keys() == new
    for name, value in plain.state_dict().items():
        assert torch.equal(value, own.state_dict()[name]), name
    images, *labels = make_batch(tiny_config)
    batch = (images.double(), *labels)
    with torch.no_grad():
        torch.testing.assert_close(own.embed(batch[0]), plain.embed(batch[0]))
        assert not own.forward_features(batch[0]).offsets.any()
        assert plain.forward_features(batch[0]).offsets is None
    terms = [model.losses(*batch) for model in made]
    torch.testing.assert_close(terms[1], terms[0])
    for each in terms:
        sum(each.values()).backward()
    shared = dict(own.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(shared[name].grad, parameter.grad, msg=name)
    assert all(shared[name].grad.any() for name in new)


@pytest.mark.parametrize("count", [4, 9])
@pytest.mark.parametrize("aspect_true", [False, True])
def test_each_image_is_warped_as_a_layer_with_its_points_would(count, aspect_true):
    ltps = layer(control_points=count, aspect_true=aspect_true)
    given = tokens()
    warped, angle, offsets = ltps(given)
    assert offsets.shape == (3, count, 2) and (offsets[0] - offsets[1]).abs().max() > 0.01
    # The published operator, whose images share their points.
    single = layer(control_points=count, aspect_true=aspect_true, points_per_image=False)
    for i in range(3):
        with torch.no_grad():
            single.source_points.copy_(ltps.source_points + offsets[i])
        torch.testing.assert_close(
            single.warp(given[i : i + 1], angle[i : i + 1]), warped[i : i + 1]
        )
        grid = ltps.sampling_grid(angle, offsets)[i : i + 1]
        torch.testing.assert_close(single.sampling_grid(angle[i : i + 1]), grid)


def test_the_points_of_an_image_depend_on_it_alone():
    ltps, given = layer(), tokens(4)
    warped, _, offsets = ltps(given)
    order = torch.tensor([2, 0, 3, 1])
    for mine, wanted in zip(ltps(given[order])[::2], (warped, offsets), strict=True):
        torch.testing.assert_close(mine, wanted[order])
    changed = given.clone()
    changed[1] += 1.0
    other = ltps(changed)[2]
    kept = torch.tensor([0, 2, 3])
    torch.testing.assert_close(other[kept], offsets[kept])
    assert (other[1] - offsets[1]).abs().max() > 1e-4
    torch.testing.assert_close(ltps(given[3:])[2], offsets[3:])


@pytest.mark.parametrize("count", [4, 9])
@pytest.mark.parametrize("aspect_true", [False, True])
def test_gradients_are_those_of_differences(count, aspect_true):
    ltps = layer(control_points=count, aspect_true=aspect_true)
    given = tokens(2).requires_grad_()
    names = [name for name, _ in ltps.named_parameters()]

    def run(given: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(ltps, named, (given,))

    parameters = tuple(p.detach().clone().requires_grad_() for p in ltps.parameters())
    assert torch.autograd.gradcheck(run, (given, *parameters), atol=1e-6, fast_mode=True)
    loss = run(given, *parameters)[0].square().sum()
    reached = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    assert all(grad.any() for grad in reached.values())


@pytest.mark.parametrize("count", [4, 9, 25])
def test_offsets_are_bounded_however_large_the_head(count):
    head = PointOffsets(6, count)
    assert head.bound == pytest.approx(REACH * 2 / (math.isqrt(count) - 1))
    with torch.no_grad():
        head.weight.normal_(std=1e4)
        offsets = head(torch.rand(50, 6))
    assert offsets.shape == (50, count, 2)
    assert offsets.abs().max() == pytest.approx(head.bound) and offsets.min() < 0


def least_area(reach: float) -> float:
    """Of the triangle of three corners of a cell of side 1, over all limits of their offsets."""
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=6)), dtype=torch.float64)
    a, b, c = (corners + reach * signs.unflatten(1, (3, 2))).unbind(dim=1)
    return float(torch.linalg.det(torch.stack([b - a, c - a], dim=1)).min() / 2)


def test_within_the_bound_no_triangle_of_neighbours_turns_over():
    assert least_area(REACH) == pytest.approx(0.0, abs=1e-12)
    assert least_area(0.9 * REACH) > 0.01 > -0.01 > least_area(1.1 * REACH)


def test_four_points_at_their_bound_never_fold_the_map():
    ltps = LTPS(8, (17, 17), LtpsConfig(points_per_image=True)).double()
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=8)), dtype=torch.float64)
    offsets = ltps.offsets.bound * signs.unflatten(1, (4, 2))
    grid = ltps.sampling_grid(signs.new_zeros(len(signs)), offsets).detach()
    across, down = grid[:, :-1, 1:] - grid[:, :-1, :-1], grid[:, 1:, :-1] - grid[:, :-1, :-1]
    assert (across[..., 0] * down[..., 1] - across[..., 1] * down[..., 0]).min() > 0


def test_weights_and_switch_survive_a_file_and_no_other_network_takes_them(tiny_config, tmp_path):
    config = with_points(tiny_config)
    own, plain = GSAlign(config), GSAlign(tiny_config)
    for model in (own, plain):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    path = tmp_path / "own.safetensors"
    save_weights(own, path)
    found = load_model(path)
    assert found.config == config and found.config.ltps.points_per_image
    for name, value in own.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    images = torch.randn(2, 3, *config.image_size)
    with torch.no_grad():
        torch.testing.assert_close(found.embed(images), own.embed(images))
    with pytest.raises(RuntimeError, match=r"Missing.*backbone\.ltps\.0\.offsets\.weight"):
        own.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected.*backbone\.ltps\.0\.offsets\.weight"):
        plain.load_state_dict(own.state_dict())
    with pytest.raises(CheckpointError, match="points_per_image True instead of False"):
        load_network(path, tiny_config)
    with pytest.raises(CheckpointError, match=r"no place for backbone\.ltps\.0\.offsets"):
        transfer_weights(GSAlign(tiny_config), path)


@pytest.mark.parametrize("aspect_true", [False, True])
def test_embedding_and_every_recomputation_agree(tiny_config, make_model, make_batch, aspect_true):
    config = with_points(tiny_config, aspect_true=aspect_true)
    model, batch = make_model(config, 0.2).eval(), make_batch(config)
    with torch.no_grad():
        seen = model.forward_features(batch[0])
        assert seen.offsets.shape == (2, 6, 4, 2) and seen.offsets.std(dim=1).max() > 0.01
        wanted = model.identity_head.embed(seen.feature)
        torch.testing.assert_close(model.embed(batch[0]), wanted)
        torch.testing.assert_close(model.embed_parts(batch[0]).vectors[:, 0], wanted)
        torch.testing.assert_close(model.embed(batch[0][2:4]), wanted[2:4])
    gradients = {}
    for recompute in ("nothing", "cheap", "layers"):
        model.backbone.recompute = recompute
        model.zero_grad()
        sum(model.losses(*batch).values()).backward()
        gradients[recompute] = [
            p.grad.clone() for name, p in model.named_parameters() if ".offsets." in name
        ]
    assert all(grad.any() for grad in gradients["nothing"])
    for recompute in ("cheap", "layers"):
        torch.testing.assert_close(gradients[recompute], gradients["nothing"])


def test_points_are_in_float32_under_autocast():
    ltps, given = layer().float(), tokens().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, angle, offsets = ltps(given)
        warped = ltps.warp(given, angle, offsets)
    assert offsets.dtype == torch.float32
    torch.testing.assert_close(warped, ltps.warp(given, angle, offsets))


def test_constants_follow_the_weights():
    with torch.device("meta"):
        empty = LTPS(8, SIZE, LtpsConfig(points_per_image=True))
    given = LTPS(8, SIZE, LtpsConfig(points_per_image=True))
    empty.load_state_dict(given.state_dict(), assign=True)
    assert torch.equal(empty.splines, given.splines) and torch.equal(empty.control, given.control)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_of_the_weight_of_the_deformation(tiny_config, make_model, make_batch, share):
    batch = make_batch(tiny_config)
    model = make_model(tiny_config).eval()
    whole = model.losses(*batch)
    part = model(*batch, deformation_share=torch.full((), share))
    assert whole["deformation"] > 0
    torch.testing.assert_close(part, whole | {"deformation": share * whole["deformation"]})
    parameter = model.backbone.ltps["0"].predictor.out.bias
    (wanted,) = torch.autograd.grad(whole["deformation"], parameter)
    (mine,) = torch.autograd.grad(part["deformation"], parameter)
    torch.testing.assert_close(mine, share * wanted)
