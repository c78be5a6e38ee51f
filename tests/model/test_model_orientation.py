"""Turning images upright: the turn, what a batch tells about its rolls, and the network with it."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import affine_grid, grid_sample

from gsalign.model import GSAlign, ModelConfig, load_model, save_weights
from gsalign.model.orientation import directions, turn, unit
from gsalign.model.orientation_rays import (
    UprightingByRays,
    orientation_loss,
    polar,
    standardised,
    targets,
)


@pytest.fixture
def config(tiny_config) -> ModelConfig:
    orientation = tiny_config.orientation.model_copy(
        update={"enabled": True, "rings": 4, "rays": 8, "width": 8, "kernels": (3, 5)}
    )
    return tiny_config.model_copy(update={"orientation": orientation})


def angle(degrees: float, count: int = 1) -> torch.Tensor:
    return directions(torch.full((count,), math.radians(degrees)))


def person(batch: int, seed: int, size: int = 32) -> torch.Tensor:
    """Upright people in a square: background, hair, coat and trousers, each of a colour."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.rand(batch, 4, 3, generator=generator) * 2 - 1
    images = colours[:, 0, :, None, None].repeat(1, 1, size, size)
    for part, (top, bottom) in enumerate(((2, 9), (9, 19), (19, 30)), start=1):
        images[:, :, top:bottom, 10:22] = colours[:, part, :, None, None]
    return images


def test_a_turn_by_nothing_and_by_half_a_circle_moves_whole_pixels():
    images = torch.randn(2, 3, 16, 8)
    assert torch.equal(turn(images, angle(0, 2), aspect=0.5), images)
    torch.testing.assert_close(turn(images, angle(180, 2), aspect=0.5), images.flip(2, 3))


def test_a_square_turned_by_a_quarter_is_the_one_of_rot90():
    """Content rolled clockwise by 90 degrees comes back upright."""
    images = torch.randn(2, 3, 8, 8)
    rolled = torch.rot90(images, k=-1, dims=(2, 3))  # clockwise
    torch.testing.assert_close(turn(rolled, angle(90, 2)), images, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("degrees", [0, 25, 90, 200])
def test_a_turn_is_rigid_in_pixels(degrees):
    """Where it reads, seen in pixels, is a rotation times one scale."""
    height, width = 40, 20
    rows, columns = torch.meshgrid(torch.arange(40.0), torch.arange(20.0), indexing="ij")
    # An image of its own coordinates tells where each output pixel was read.
    where = turn(torch.stack([columns, rows])[None], angle(degrees), aspect=width / height)[0]
    middle = (slice(19, 22), slice(9, 12))
    x, y = where[0][middle], where[1][middle]
    right = torch.stack([x[1, 2] - x[1, 0], y[1, 2] - y[1, 0]]) / 2
    down = torch.stack([x[2, 1] - x[0, 1], y[2, 1] - y[0, 1]]) / 2
    assert float(right @ down) == pytest.approx(0, abs=1e-4)
    assert float(right.norm()) == pytest.approx(float(down.norm()), rel=1e-4)
    t = math.radians(degrees)
    assert float(down.norm()) == pytest.approx(math.hypot(math.cos(t), 0.5 * math.sin(t)), rel=1e-4)


def test_the_turn_is_grid_sample_on_an_affine_grid():
    images, direction = torch.randn(5, 3, 12, 6), directions(torch.rand(5) * 7)
    cosine, sine = direction.unbind(1)
    zero = torch.zeros(5)
    matrix = torch.stack([cosine, -sine, zero, 0.25 * sine, cosine, zero], 1).view(5, 2, 3)
    grid = affine_grid(matrix, list(images.shape), align_corners=False)
    wanted = grid_sample(images, grid, padding_mode="border", align_corners=False)
    torch.testing.assert_close(turn(images, direction, aspect=0.5), wanted, rtol=1e-4, atol=1e-4)


def test_a_roll_by_whole_rays_shifts_the_polar_map():
    """A quarter of the circle, which the square grid of pixels allows exactly."""
    images = torch.randn(2, 3, 32, 32)
    rolled = torch.rot90(images, k=-1, dims=(2, 3))  # clockwise
    torch.testing.assert_close(
        polar(rolled, 8, 16), polar(images, 8, 16).roll(4, dims=3), rtol=1e-4, atol=1e-5
    )


def test_rays_go_clockwise_from_the_top():
    images = torch.zeros(1, 1, 32, 32)
    images[:, :, :8, 12:20] = 1.0
    images[:, :, 12:20, 24:] = 2.0
    outer = polar(images, 8, 8)[0, 0, -2]
    assert outer.tolist() == pytest.approx([1, 0, 2, 0, 0, 0, 0, 0], abs=1e-5)


def test_the_predictor_turns_its_answer_with_the_image(config):
    """Whatever its weights are."""
    uprighting = UprightingByRays((32, 32), config.orientation).double()
    maps = torch.randn(4, 3, 4, 8, dtype=torch.float64)
    with torch.no_grad():
        before, after = uprighting.predictor(maps), uprighting.predictor(maps.roll(3, dims=3))
    by = torch.complex(*directions(torch.tensor(2 * math.pi * 3 / 8).double()))
    torch.testing.assert_close(
        torch.complex(*after.T.contiguous()), torch.complex(*before.T.contiguous()) * by
    )


def test_the_unit_vector_of_nothing_has_a_finite_gradient():
    vectors = torch.zeros(1, 2, requires_grad=True)
    unit(vectors)[0, 0].backward()
    assert vectors.grad.isfinite().all()


def test_standardised_images_do_not_see_brightness_and_contrast():
    images = torch.randn(3, 3, 8, 8)
    weights = torch.full((8, 8), 1 / 64)
    brighter = 2.0 * images + 0.3
    torch.testing.assert_close(
        standardised(images, weights), standardised(brighter, weights), rtol=0.05, atol=0.05
    )


def test_targets_find_the_roll_of_aerial_images_by_the_ground_images_of_the_person():
    """Six people, upright from the ground and rolled from the air, by angles between the rays."""
    upright = person(6, seed=1)
    rolls = torch.linspace(0.3, 6.0, 6)
    aerial = turn(upright, directions(-rolls))
    identities = torch.arange(6).repeat(2)
    views = torch.tensor([0] * 6 + [1] * 6)
    found = targets(polar(torch.cat([upright, aerial]), 16, 32), identities, views)
    assert torch.equal(found[:6], torch.tensor([[1.0, 0.0]] * 6))
    closeness = (unit(found[6:]) * directions(rolls)).sum(dim=1)
    assert closeness.min() > math.cos(math.radians(20))
    assert (found.norm(dim=1) <= 1 + 1e-6).all()


def test_an_aerial_image_without_ground_images_of_the_person_has_no_target():
    maps = polar(person(3, seed=2), 16, 32)
    found = targets(maps, torch.tensor([0, 1, 1]), torch.tensor([1, 1, 0]))
    assert torch.equal(found[0], torch.zeros(2))
    assert found[1].norm() > 0


def test_the_loss_teaches_the_roll(config):
    """On people of three colours the predictor learns to tell it, given ground images alone."""
    uprighting = UprightingByRays((32, 32), config.orientation)
    optimizer = torch.optim.AdamW(uprighting.parameters(), lr=1e-2)
    identities, ground = torch.arange(16), torch.zeros(16, dtype=torch.int64)
    people = person(16, seed=3)
    people[:, :, 2:9, 10:22] = 1.0  # all have white hair
    rolls = torch.linspace(0.1, 6.2, 16)
    rolled = turn(people, directions(-rolls))

    def closeness() -> float:
        aligned = uprighting(rolled)
        direction = aligned.direction
        assert aligned.images.shape == people.shape and not direction.requires_grad
        return float((direction * directions(rolls)).sum(dim=1).mean())

    before = closeness()
    for _ in range(25):
        loss = orientation_loss(*uprighting.look(people), identities, ground)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before < 0.7 and closeness() > 0.9


def test_label_maps_follow_the_turn_and_come_back(config):
    """As pixels of a picture do; what the turn moved out of the image comes back as unknown."""
    uprighting = UprightingByRays((32, 16), config.orientation)
    labels = torch.randint(0, 7, (3, 8, 4), dtype=torch.uint8)
    labels = labels.repeat_interleave(4, 1).repeat_interleave(4, 2)
    labels[:, :4] = 255
    direction = directions(torch.tensor([0.0, math.pi, 0.8]))
    turned = uprighting.turn_labels(labels, direction)
    assert turned.dtype == torch.uint8
    assert torch.equal(turned[0], labels[0])
    assert torch.equal(turned[1], labels[1].flip(0, 1))
    picture = uprighting.turn(labels[:, None].float(), direction, mode="nearest")
    assert torch.equal(turned.float(), picture[:, 0])
    back = uprighting.turn_labels_back(turned, direction, outside=255)
    assert torch.equal(back[:2], labels[:2])
    inside = back[2] != 255
    assert 0.3 < inside.float().mean() < 0.9
    assert (back[2] == labels[2])[inside].float().mean() > 0.8


def test_masks_are_taught_by_the_labels_of_turned_images(config, tiny_config, make_batch):
    """The loss of a network that turns is that of one that does not, all turned for it."""
    parts = {"parts": 2, "part_cells": 2}
    weights = config.losses.model_copy(update={"part_labels": 1.0})
    model = GSAlign(config.model_copy(update={**parts, "losses": weights})).eval()
    plain = GSAlign(tiny_config.model_copy(update={**parts, "losses": weights})).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    images, identities, views = make_batch(config)
    labels = torch.randint(0, 3, (len(images), *config.image_size), dtype=torch.uint8)
    with torch.no_grad():
        aligned = model.uprighting(images)
        turned_labels = model.uprighting.turn_labels(labels, aligned.direction)
        assert not torch.equal(turned_labels, labels)
        mine = model.losses(images, identities, views, labels)
        wanted = plain.losses(aligned.images, identities, views, turned_labels)
    assert set(mine) - set(wanted) == {"orientation"}
    for name, loss in wanted.items():
        torch.testing.assert_close(mine[name], loss, msg=name)


def test_without_it_the_network_is_the_published_one_bit_for_bit(tiny_config, config, make_batch):
    torch.manual_seed(5)
    plain = GSAlign(tiny_config)
    torch.manual_seed(5)
    upright = GSAlign(config)
    assert plain.uprighting is None and not tiny_config.orientation.enabled
    names = dict(plain.named_parameters())
    for name, parameter in upright.named_parameters():
        if not name.startswith("uprighting."):
            assert torch.equal(parameter, names.pop(name)), name
    assert not names
    assert "orientation" not in plain.losses(*make_batch(tiny_config))


def test_the_network_sees_turned_images(config, tiny_config, make_batch):
    torch.manual_seed(5)
    model = GSAlign(config).eval()
    images, identities, views = make_batch(config)
    with torch.no_grad():
        aligned = model.uprighting(images)
        assert aligned.person is None
        plain = GSAlign(tiny_config).eval()
        plain.load_state_dict(model.state_dict(), strict=False)
        torch.testing.assert_close(model.embed(images), plain.embed(aligned.images))
        seen = model.forward_features(images)
        torch.testing.assert_close(seen.direction, aligned.direction)
        assert seen.person is None
    terms = model.losses(images, identities, views)
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in model.uprighting.parameters())
    assert float(terms["orientation"].detach()) >= 0


def test_it_survives_a_checkpoint(config, tmp_path, make_batch):
    model = GSAlign(config).eval()
    images, *_ = make_batch(config)
    save_weights(model, tmp_path / "model.safetensors")
    torch.testing.assert_close(
        load_model(tmp_path / "model.safetensors").eval().embed(images), model.embed(images)
    )


@pytest.mark.parametrize("kernels", [[4], [33], []])
def test_kernels_that_do_not_reach_both_ways_are_refused(kernels):
    with pytest.raises(ValueError, match="must be odd numbers"):
        ModelConfig(orientation={"kernels": kernels})
