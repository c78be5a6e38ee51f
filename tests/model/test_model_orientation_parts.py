"""The roll from body parts: the axis of label maps, what finds them, and the network with it."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from gsalign.errors import CheckpointError
from gsalign.model import GSAlign, ModelConfig, create_model, load_model, save_weights
from gsalign.model.config import OrientationConfig
from gsalign.model.losses import part_labels as mean_cost
from gsalign.model.orientation import directions, turn
from gsalign.model.orientation_parts import (
    GROUPS,
    UNKNOWN,
    UprightingByParts,
    body_axis,
    look_reduction,
)
from gsalign.search import fingerprint

TINY_FINDER = OrientationConfig(enabled=True, reads="parts", finder_width=4)


def body(size: int = 64) -> torch.Tensor:
    """Labels of an upright person in a square, ``[1, size, size]``: head, torso, legs."""
    labels = torch.zeros(1, size, size, dtype=torch.uint8)
    row, column = size // 16, size // 2
    labels[:, 2 * row : 4 * row, column - row : column + row] = 1
    labels[:, 4 * row : 9 * row, column - 2 * row : column + 2 * row] = 2
    labels[:, 9 * row : 14 * row, column - row : column + row] = 3
    return labels


def shares(labels: torch.Tensor) -> torch.Tensor:
    return functional.one_hot(labels.long(), 4).permute(0, 3, 1, 2).double()


def finder(size: tuple[int, int] = (32, 16), groups: int = 3, width: int = 4) -> UprightingByParts:
    config = TINY_FINDER.model_copy(update={"finder_width": width})
    return UprightingByParts(size, config, groups)


@pytest.fixture
def config(tiny_config) -> ModelConfig:
    return tiny_config.model_copy(update={"orientation": TINY_FINDER})


@pytest.mark.parametrize("quarters", range(4))
def test_the_axis_turns_with_the_map(quarters):
    """By quarters of the circle, clockwise, exactly."""
    upright = body_axis(shares(body()), 1.0)
    assert upright[0, 0] > 0.1 and upright[0, 1].abs() < 1e-12
    turned = torch.rot90(body(), k=-quarters, dims=(1, 2))
    axis = torch.complex(*body_axis(shares(turned), 1.0)[0])
    wanted = torch.complex(*upright[0]) * torch.polar(
        torch.tensor(1.0).double(), torch.tensor(quarters * math.pi / 2).double()
    )
    torch.testing.assert_close(axis, wanted)


@pytest.mark.parametrize("degrees", [20, 77, 130, 245, 341])
def test_the_axis_is_what_a_turn_undoes(degrees):
    direction = directions(torch.tensor([math.radians(degrees)]))
    rolled = turn(
        body()[:, None].float(), directions(-torch.tensor([math.radians(degrees)])), mode="nearest"
    )
    axis = body_axis(shares(rolled[:, 0].to(torch.uint8)), 1.0)
    assert functional.cosine_similarity(axis, direction.double()) > math.cos(math.radians(2))


def test_the_axis_is_measured_in_pixels():
    """A diagonal of the map is a steep one of an image twice as high as wide."""
    labels = torch.zeros(1, 8, 8, dtype=torch.uint8)
    labels[0, 0, 7], labels[0, 7, 0] = 1, 3
    up, right = body_axis(shares(labels), 0.5)[0]
    assert up == pytest.approx(2 * float(right)) and right > 0


def test_hidden_parts_leave_the_axis_to_the_others():
    whole = body()
    for hidden in (1, 2, 3):
        up, right = body_axis(shares(whole.masked_fill(whole == hidden, 0)), 1.0)[0]
        assert up > 0.05 and right.abs() < 1e-12
    nobody, torso = torch.zeros_like(whole), whole.masked_fill(whole != 2, 0)
    assert torch.equal(body_axis(shares(nobody), 1.0), torch.zeros(1, 2).double())
    assert body_axis(shares(torso), 1.0).abs().max() < 1e-12


def test_foreshortened_bodies_have_a_shorter_axis():
    short = functional.interpolate(body()[:, None].float(), size=(16, 64), mode="nearest")
    short = functional.pad(short, (0, 0, 24, 24))[:, 0].to(torch.uint8)
    assert body_axis(shares(short), 1.0)[0, 0] < 0.3 * body_axis(shares(body()), 1.0)[0, 0]


@pytest.mark.parametrize("size", [(32, 16), (45, 23), (96, 40), (256, 128)])
def test_upside_down_the_answer_is_the_opposite(size):
    """Whatever the weights are."""
    uprighting = finder(size).double()
    images = torch.randn(3, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        axis = body_axis(uprighting.shares(images), 0.5)
        opposite = body_axis(uprighting.shares(images.flip(2, 3)), 0.5)
        direction = uprighting.direction(images)
    torch.testing.assert_close(opposite, -axis)
    torch.testing.assert_close(direction.norm(dim=1), torch.ones(3).double())


def test_where_no_body_is_found_the_image_stays_as_it_is():
    uprighting = finder()
    torch.nn.init.zeros_(uprighting.finder.out.weight)
    images = torch.randn(2, 3, 32, 16)
    aligned = uprighting(images)
    upright = torch.tensor([[1.0, 0.0]] * 2)
    torch.testing.assert_close(aligned.direction, upright, atol=1e-2, rtol=0)
    torch.testing.assert_close(aligned.images, images, atol=0.1, rtol=0)


def test_brightness_and_contrast_do_not_matter():
    uprighting = finder()
    images = torch.randn(2, 3, 32, 16)
    with torch.no_grad():
        plain, bright = uprighting.logits(images), uprighting.logits(1.5 * images + 0.4)
    torch.testing.assert_close(plain, bright, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("groups", GROUPS)
def test_label_maps_cost_the_same_in_any_number_of_groups(groups):
    torch.manual_seed(4)
    uprighting = finder(groups=groups)
    images = torch.randn(4, 3, 32, 16)
    labels = torch.randint(0, groups + 1, (4, 32, 16), dtype=torch.uint8)
    in_three = torch.tensor(GROUPS[groups], dtype=torch.uint8)[labels.long()]
    torch.manual_seed(5)
    three = finder()
    three.load_state_dict(uprighting.state_dict())
    (costs,), (wanted,) = uprighting.look(images, labels), three.look(images, in_three)
    assert torch.equal(costs, wanted)
    assert (costs[:, 0] > 0).all()


def test_every_other_image_is_looked_at_upside_down():
    uprighting = finder().double()
    images = torch.randn(2, 3, 32, 16, dtype=torch.float64)
    labels = torch.randint(0, 4, (2, 32, 16), dtype=torch.uint8)
    labels[1, 20:] = UNKNOWN
    (costs,) = uprighting.look(images, labels)
    (turned,) = uprighting.look(images[[1]].flip(2, 3), labels[[1]].flip(1, 2))
    (first,) = uprighting.look(images[[0]], labels[[0]])
    torch.testing.assert_close(costs, torch.cat([first, turned]))
    known = costs[:, 1] / costs[0, 1]
    torch.testing.assert_close(known, torch.tensor([1.0, 20 / 32]).double())
    torch.testing.assert_close(
        uprighting.loss([costs], labels[:, 0, 0].long(), labels[:, 0, 0].long()), mean_cost(costs)
    )


def test_without_label_maps_there_is_nothing_to_learn_from():
    with pytest.raises(ValueError, match=r"part_labels is None.*'rays'"):
        finder().look(torch.randn(2, 3, 32, 16), None)


def test_the_loss_teaches_the_roll():
    """People of a head, coat and trousers, given upright; told when rolled, of other colours."""
    torch.manual_seed(0)
    uprighting = finder((32, 32), width=8)
    optimizer = torch.optim.AdamW(uprighting.parameters(), lr=1e-2)
    labels = body(32).repeat(16, 1, 1)

    def people() -> torch.Tensor:
        colours = torch.rand(16, 4, 3) - 0.5
        colours[:, 1], colours[:, 3] = 1.0, -1.0  # all have white hair and black trousers
        return (
            colours.gather(1, labels.flatten(1).long()[..., None].expand(-1, -1, 3))
            .unflatten(1, (32, 32))
            .permute(0, 3, 1, 2)
        )

    rolls = torch.linspace(0.1, 6.2, 16)
    for step in range(60):
        rolled = directions(-rolls.roll(step))
        images = turn(people(), rolled)
        maps = turn(labels[:, None].float(), rolled, mode="nearest")[:, 0].to(torch.uint8)
        looked = uprighting.look(images, maps)
        loss = uprighting.loss(looked, labels[:, 0, 0].long(), labels[:, 0, 0].long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = uprighting.direction(turn(people(), directions(-rolls)))
    assert (found * directions(rolls)).sum(dim=1).mean() > 0.95


@pytest.mark.parametrize(
    ("size", "reduction"),
    [
        ((32, 16), 1),
        ((128, 64), 2),
        ((256, 128), 4),
        ((384, 128), 4),
        ((224, 224), 2),
        ((130, 64), 2),
        ((135, 64), 1),
    ],
)
def test_the_small_image_divides_the_image(size, reduction):
    assert look_reduction(size) == reduction


def test_the_network_is_taught_by_label_maps(config, make_batch, tmp_path):
    model = GSAlign(config).eval()
    images, identities, views = make_batch(config)
    labels = torch.randint(0, 4, (len(images), *config.image_size), dtype=torch.uint8)
    terms = model.losses(images, identities, views, labels)
    sum(terms.values()).backward()
    assert float(terms["orientation"].detach()) > 0.5
    assert all(p.grad is not None and p.grad.any() for p in model.uprighting.parameters())
    with pytest.raises(ValueError, match="part_labels is None"):
        model.losses(images, identities, views)
    save_weights(model, tmp_path / "model.safetensors")
    again = load_model(tmp_path / "model.safetensors").eval()
    torch.testing.assert_close(again.embed(images), model.embed(images))
    torch.testing.assert_close(again.losses(images, identities, views, labels), terms)


def test_into_how_many_groups_label_maps_are_put():
    def groups(**settings) -> int:
        return ModelConfig.model_validate(settings).label_groups

    by_parts = {"enabled": True, "reads": "parts"}
    assert groups() == groups(orientation={"enabled": True}) == 0
    assert groups(parts=2) == 0 and groups(parts=2, losses={"part_labels": 1.0}) == 2
    assert groups(orientation=by_parts) == groups(parts=2, orientation=by_parts) == 3
    assert groups(parts=5, losses={"part_labels": 1.0}, orientation=by_parts) == 5


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"parts": 2, "losses": {"part_labels": 1.0}}, "parts 2 do not: take 3 to 6 parts"),
        ({"orientation": {"enabled": True, "reads": "parts", "finder_width": 6}}, "multiple of 4"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, told):
    orientation = {"enabled": True, "reads": "parts"}
    with pytest.raises(ValueError, match=told):
        ModelConfig.model_validate({"orientation": orientation, **settings})


def test_a_predictor_of_another_run_is_taken_and_kept(config, make_batch, tmp_path):
    torch.manual_seed(1)
    teacher, path = GSAlign(config), tmp_path / "teacher.safetensors"
    save_weights(teacher, path)
    taken = config.orientation.model_copy(update={"pretrained": str(path)})
    pupil_config = config.model_copy(update={"orientation": taken})
    assert pupil_config.label_groups == 0
    pupil, _ = create_model(pupil_config)
    images, identities, views = make_batch(config)
    torch.testing.assert_close(
        pupil.uprighting.direction(images), teacher.uprighting.direction(images)
    )
    terms = pupil.losses(images, identities, views)
    sum(terms.values()).backward()
    assert "orientation" not in terms
    assert all(p.grad is None for p in pupil.uprighting.parameters())
    # Where it came from says nothing about what it computes.
    same = GSAlign(config)
    same.load_state_dict(pupil.state_dict())
    assert fingerprint(pupil) == fingerprint(same)


def test_a_predictor_that_is_not_there_is_named(config, tmp_path):
    nowhere = str(tmp_path / "finder.safetensors")
    taken = config.orientation.model_copy(update={"pretrained": nowhere})
    with pytest.raises(CheckpointError, match=r"^model\.orientation\.pretrained: no .*finder"):
        create_model(config.model_copy(update={"orientation": taken}))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"enabled": False}, "turns no images"),
        ({"reads": "rays"}, "turns images in another way"),
        ({"finder_width": 8}, "turns images in another way"),
    ],
)
def test_a_predictor_of_another_kind_is_refused(config, tmp_path, change, told):
    path = tmp_path / "teacher.safetensors"
    orientation = config.orientation.model_copy(update=change)
    save_weights(GSAlign(config.model_copy(update={"orientation": orientation})), path)
    taken = config.orientation.model_copy(update={"pretrained": str(path)})
    with pytest.raises(CheckpointError, match=f"teacher.safetensors: its network {told}"):
        create_model(config.model_copy(update={"orientation": taken}))
