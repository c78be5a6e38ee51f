"""Cutting the person out: what becomes grey, with and without a turn, and the network with it."""

from __future__ import annotations

import pytest
import torch

from gsalign.model import GSAlign, ModelConfig, create_model, save_weights
from gsalign.model.config import OrientationConfig
from gsalign.model.orientation import turn
from gsalign.model.orientation_parts import UprightingByParts
from gsalign.search import fingerprint

CUTTING = OrientationConfig(enabled=True, reads="parts", cuts_out=True, finder_width=4)
CUTTING_ALONE = CUTTING.model_copy(update={"turns": False})


@pytest.fixture
def config(tiny_config) -> ModelConfig:
    return tiny_config.model_copy(update={"orientation": CUTTING})


def uprighting(config: OrientationConfig, found: torch.Tensor) -> UprightingByParts:
    """One that finds legs with these shares, ``[B, h, w]``, and otherwise background."""
    made = UprightingByParts((32, 16), config, 3)
    nothing = torch.zeros_like(found)
    made.shares = lambda images: torch.stack([1 - found, nothing, nothing, found], dim=1)
    return made


def test_what_is_not_of_the_person_becomes_grey():
    """0 is grey once images are normalised; on an outline by shares."""
    found = torch.zeros(2, 32, 16)
    found[0, 4:20, 3:9], found[1] = 1.0, 0.25
    images = torch.randn(2, 3, 32, 16)
    aligned = uprighting(CUTTING_ALONE, found)(images)
    assert aligned.direction is None
    assert torch.equal(aligned.images, images * found.unsqueeze(1))


def test_who_is_not_found_is_not_cut_out():
    """A grey image would say nothing, to the network and in a search."""
    found = torch.zeros(3, 32, 16)
    found[0, 4:20, 3:9], found[1, 0, :9] = 1.0, 1.0  # the second: 9 pixels of 512
    images = torch.randn(3, 3, 32, 16)
    aligned = uprighting(CUTTING_ALONE, found)(images)
    assert torch.equal(aligned.images[1:], images[1:])
    assert torch.equal(aligned.images[0], images[0] * found[0])
    assert (aligned.person[1:] == 1).all()


def test_shares_of_a_small_image_are_spread_over_the_pixels():
    made = uprighting(CUTTING_ALONE, torch.rand(2, 16, 8))
    made.reduction = 2
    ones = torch.ones(2, 3, 32, 16)
    aligned, (_, person) = made(ones), made.see(ones)
    assert torch.equal(aligned.person, person)
    assert torch.equal(aligned.images, person.expand_as(ones))
    small = made.shares(ones)[:, 3]
    # Bilinear: every cell of four pixels has its own share as their mean, but for what its
    # neighbours lend it; one share everywhere stays one share everywhere.
    assert (torch.nn.functional.avg_pool2d(person, 2)[:, 0] - small).abs().mean() < 0.1
    even = uprighting(CUTTING_ALONE, torch.full((2, 16, 8), 0.3))
    torch.testing.assert_close(even(ones).images, torch.full((2, 3, 32, 16), 0.3))


def test_who_is_cut_out_is_turned_before_grey():
    """A person who touches the border is not drawn out beyond it; a whole image is."""
    found = torch.ones(1, 32, 16)
    made = uprighting(CUTTING, found)
    images, direction = torch.randn(1, 3, 32, 16), torch.tensor([[0.6, 0.8]])
    made.see = lambda images: (direction, found.unsqueeze(1))
    wanted = turn(images, direction, aspect=0.5, padding_mode="zeros")
    aligned = made(images)
    assert torch.equal(aligned.images, wanted) and torch.equal(aligned.direction, direction)
    assert not torch.equal(wanted, turn(images, direction, aspect=0.5))
    labels = torch.ones(1, 32, 16, dtype=torch.uint8)
    assert set(made.turn_labels(labels, direction).flatten().tolist()) == {0, 1}


def test_the_network_sees_what_was_cut_out(config, make_batch):
    for orientation in (CUTTING, CUTTING_ALONE):
        model = GSAlign(config.model_copy(update={"orientation": orientation})).eval()
        images, _, _ = make_batch(config)
        with torch.no_grad():
            aligned = model.uprighting(images)
            output, embedded = model.forward_features(images), model.embed(images)
            plain = GSAlign(config).eval()
            plain.load_state_dict(model.state_dict())
            plain.uprighting = None
            assert not torch.equal(aligned.images, images)
            torch.testing.assert_close(embedded, plain.embed(aligned.images))
        assert (output.direction is None) == (aligned.direction is None) == (not orientation.turns)
        torch.testing.assert_close(output.person, aligned.person)


def test_losses_of_re_identification_do_not_reach_the_finder(config, make_batch):
    model = GSAlign(config)
    images, identities, views = make_batch(config)
    labels = torch.randint(0, 4, (len(images), *config.image_size), dtype=torch.uint8)
    terms = model.losses(images, identities, views, labels)
    learns = terms.pop("orientation")
    sum(terms.values()).backward()
    assert all(p.grad is None for p in model.uprighting.parameters())
    learns.backward()
    assert all(p.grad.any() for p in model.uprighting.parameters())


def test_a_finder_may_have_learned_for_another_purpose(config, tmp_path):
    """What turns images only finds the same parts."""
    path = tmp_path / "finder.safetensors"
    turning = CUTTING.model_copy(update={"cuts_out": False})
    teacher = GSAlign(config.model_copy(update={"orientation": turning}))
    save_weights(teacher, path)
    taken = CUTTING_ALONE.model_copy(update={"pretrained": str(path)})
    pupil, _ = create_model(config.model_copy(update={"orientation": taken}))
    for name, tensor in teacher.uprighting.state_dict().items():
        assert torch.equal(pupil.uprighting.state_dict()[name], tensor)
    # An index of one is none of the other.
    both = GSAlign(config)
    both.load_state_dict(pupil.state_dict())
    assert fingerprint(pupil) != fingerprint(both)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"cuts_out": True}, "cuts_out needs reads 'parts', got 'rays'"),
        ({"turns": False}, "turns and cuts_out are both off"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        OrientationConfig.model_validate({"enabled": True, **settings})
