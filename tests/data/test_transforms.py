from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from gsalign.data import AugmentationConfig, Draw, TrainTransform, denormalize, normalize, resize
from gsalign.data.samplers import draws_of


def pictures(count: int, height: int = 64, width: int = 32, seed: int = 0) -> torch.Tensor:
    """Smooth uint8 images, so that interpolation is gentle."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (count, 3, 6, 4), dtype=torch.uint8, generator=generator)
    return tv.resize(coarse, [height, width], InterpolationMode.BILINEAR)


def only(**steps) -> AugmentationConfig:
    return AugmentationConfig.none().model_copy(update=steps)


def test_normalize_maps_0_to_255_onto_minus_1_to_1():
    values = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert torch.allclose(normalize(values), torch.tensor([-1.0, -0.6, 1.0]))
    assert values.tolist() == [0, 51, 255]
    assert torch.equal(
        denormalize(normalize(torch.arange(256, dtype=torch.uint8))),
        torch.arange(256, dtype=torch.uint8),
    )


def test_resize_is_bicubic_with_antialiasing_and_leaves_the_right_size_alone():
    image = pictures(1, 100, 70)[0]
    small = resize(image, (32, 16))
    assert small.shape == (3, 32, 16)
    assert small.dtype == torch.uint8
    wanted = torch.nn.functional.interpolate(
        image[None].float(), (32, 16), mode="bicubic", antialias=True, align_corners=False
    )[0]
    assert (small.float() - wanted).abs().max() <= 1.5
    assert resize(image, (100, 70)) is image


def test_no_augmentation_is_the_test_transform():
    images = pictures(4)
    result = TrainTransform(AugmentationConfig.none(), seed=1)(images, draws_of(range(4)))
    assert torch.equal(result, normalize(images))


@pytest.mark.parametrize("name", ["cargo", "ag_reid", "light"])
def test_published_sets_give_images_of_the_right_shape_and_range(name):
    images = pictures(8)
    kept = images.clone()
    result = TrainTransform(getattr(AugmentationConfig, name)(), seed=3)(images, draws_of(range(8)))
    assert result.shape == images.shape
    assert result.dtype == torch.float32
    assert result.is_contiguous()
    assert -1.0 <= result.min() and result.max() <= 1.0
    assert torch.equal(images, kept)
    assert (result - normalize(images)).abs().mean() > 0.02


def test_the_published_settings():
    cargo, ag_reid = AugmentationConfig.cargo(), AugmentationConfig.ag_reid()
    assert (cargo.crop_padding, cargo.flip, cargo.rotation) == (10, 0.5, 30.0)
    assert (cargo.erasing, cargo.augmix) == (0.5, 0.0)
    assert (ag_reid.crop_padding, ag_reid.flip, ag_reid.rotation) == (10, 0.5, 0.0)
    assert (ag_reid.erasing, ag_reid.augmix) == (0.3, 0.3)


@pytest.mark.parametrize("name", ["cargo", "ag_reid", "light"])
def test_an_image_is_augmented_the_same_in_whatever_batch_it_comes(name):
    transform = TrainTransform(getattr(AugmentationConfig, name)(), seed=3)
    images = pictures(6)
    draws = [Draw(0, 4, 10 + i) for i in range(6)]
    together = transform(images, draws)
    torch.manual_seed(99)
    for i in (5, 0, 3):
        assert torch.equal(transform(images[i : i + 1], [draws[i]])[0], together[i])
    assert not torch.equal(transform(images, [Draw(0, 5, 10 + i) for i in range(6)]), together)
    other = TrainTransform(getattr(AugmentationConfig, name)(), seed=4)
    assert not torch.equal(other(images, draws), together)


def test_two_draws_of_one_image_differ():
    images = pictures(1).repeat(2, 1, 1, 1)
    result = TrainTransform(AugmentationConfig.cargo())(images, [Draw(0, 0, 0), Draw(0, 0, 1)])
    assert not torch.equal(result[0], result[1])


def test_global_random_state_is_left_alone():
    transform = TrainTransform(only(augmix=1.0, flip=0.5, rotation=10.0), seed=0)
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    transform(pictures(3), draws_of(range(3)))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


def test_flip_mirrors_about_half_of_the_images():
    images = pictures(1).expand(400, -1, -1, -1).contiguous()
    result = TrainTransform(only(flip=0.5), seed=1)(images, draws_of(range(400)))
    plain, mirrored = normalize(images[0]), normalize(images[0].flip(-1))
    flipped = sum(torch.equal(image, mirrored) for image in result)
    assert flipped + sum(torch.equal(image, plain) for image in result) == 400
    assert 160 <= flipped <= 240


def test_crop_shifts_by_whole_pixels_over_black():
    images = pictures(1).expand(600, -1, -1, -1).contiguous()
    result = denormalize(TrainTransform(only(crop_padding=3), seed=1)(images, draws_of(range(600))))
    padded = torch.nn.functional.pad(images[0], [3, 3, 3, 3])
    crops = {(y, x): padded[:, y : y + 64, x : x + 32] for y in range(7) for x in range(7)}
    found = set()
    for image in result:
        places = [place for place, crop in crops.items() if torch.equal(image, crop)]
        assert len(places) == 1
        found.update(places)
    # All 49 crops, both ends included, are equally likely.
    assert len(found) == 49


def test_the_warp_is_crop_flip_rotation_and_scale_one_after_the_other():
    config = only(crop_padding=5, flip=0.5, rotation=30.0, scale=0.2)
    transform = TrainTransform(config, seed=2)
    images = pictures(24, 80, 40, seed=1)
    draws = draws_of(range(24))
    drawn = transform._draw(draws, 80, 40)
    result = transform(images, draws).mul(127.5).add(127.5)
    for i, image in enumerate(images):
        y, x = (drawn.shift[i] + 5).tolist()
        step = torch.nn.functional.pad(image, [5] * 4)[:, y : y + 80, x : x + 40]
        if drawn.flip[i]:
            step = step.flip(-1)
        wanted = tv.affine(
            step.float(),
            angle=-math.degrees(drawn.angle[i]),
            translate=[0, 0],
            scale=float(drawn.scale[i]),
            shear=[0.0, 0.0],
            interpolation=InterpolationMode.BILINEAR,
            fill=0.0,
        )
        difference = (result[i] - wanted).abs().amax(0)
        # Where black borders meet the image the interpolations mix differently.
        assert difference.median() < 0.01, i
        assert (difference > 2.0).float().mean() < 0.06, i
        # Black stays black, and nothing that was cropped away turns up again.
        black = wanted.amax(0) < 1.0
        assert (result[i].amax(0) > 8.0)[black].sum() <= 0.02 * black.sum() + 1


def test_rotation_and_scale_cover_their_range_evenly():
    transform = TrainTransform(only(rotation=30.0, scale=0.08), seed=0)
    drawn = transform._draw(draws_of(range(3000)), 64, 32)
    degrees = np.rad2deg(drawn.angle)
    assert np.abs(degrees).max() <= 30.0
    assert 0.92 <= drawn.scale.min() and drawn.scale.max() <= 1.08
    for values, low, high in ((degrees, -30, 30), (drawn.scale, 0.92, 1.08)):
        shares = np.histogram(values, bins=6, range=(low, high))[0] / 3000
        assert np.abs(shares - 1 / 6).max() < 0.03


def test_erasing_fills_one_rectangle_with_the_mean_colour():
    config = only(erasing=1.0)
    images = torch.full((200, 3, 64, 32), 7, dtype=torch.uint8)
    result = TrainTransform(config, seed=0)(images, draws_of(range(200)))
    fill = normalize(torch.tensor(config.erasing_fill)).view(3, 1, 1)
    shares = []
    for image in result:
        erased = (image - normalize(images[0])).abs().amax(0) > 1e-6
        assert torch.allclose(image, torch.where(erased, fill, normalize(images[0])))
        rows, columns = erased.any(1).sum().item(), erased.any(0).sum().item()
        assert erased.sum() == rows * columns  # a full rectangle
        shares.append(rows * columns / (64 * 32))
        assert 0.2 < rows / columns < 5.0
    assert 0.01 < min(shares) and max(shares) < 0.36
    assert max(shares) > 0.25 and min(shares) < 0.06


def test_erasing_hits_the_asked_share_of_images():
    images = torch.zeros(500, 3, 32, 16, dtype=torch.uint8)
    result = TrainTransform(only(erasing=0.3), seed=0)(images, draws_of(range(500)))
    assert 110 <= sum((image != -1.0).any().item() for image in result) <= 190


def test_colour_jitter_is_brightness_contrast_and_saturation():
    transform = TrainTransform(only(color_jitter=0.3), seed=0)
    images = (pictures(16).float() * 0.3 + 80).to(torch.uint8)  # far from clipping
    draws = draws_of(range(16))
    drawn = transform._draw(draws, 64, 32)
    result = transform(images, draws)
    for i, image in enumerate(images):
        # torchvision multiplies images in 0 .. 1; its grey weights are rounded alike.
        step = tv.adjust_brightness(image.float() / 255, float(drawn.brightness[i]))
        step = tv.adjust_contrast(step, float(drawn.contrast[i]))
        step = tv.adjust_saturation(step, float(drawn.saturation[i]))
        assert torch.allclose(result[i], normalize(step * 255), atol=2e-3), i
    factors = np.stack([drawn.brightness, drawn.contrast, drawn.saturation])
    assert 0.7 <= factors.min() and factors.max() <= 1.3
    assert len(np.unique(factors)) == factors.size


def test_augmix_changes_the_asked_share_of_images():
    images = pictures(60)
    config = only(augmix=0.3, augmix_severity=5, augmix_alpha=1.0)
    result = TrainTransform(config, seed=0)(images, draws_of(range(60)))
    changed = sum(not torch.equal(a, b) for a, b in zip(result, normalize(images), strict=True))
    assert 6 <= changed <= 30


def test_switching_a_step_on_does_not_change_the_draws_of_the_others():
    draws = draws_of(range(8))
    plain = TrainTransform(only(flip=0.5), seed=1)._draw(draws, 64, 32)
    more = TrainTransform(only(flip=0.5, rotation=20.0, erasing=1.0), seed=1)._draw(draws, 64, 32)
    assert np.array_equal(plain.flip, more.flip)


def test_wrong_inputs_are_named():
    transform = TrainTransform(AugmentationConfig.none())
    with pytest.raises(TypeError, match=r"torch.float32 \(1, 3, 8, 8\); wanted uint8"):
        transform(torch.zeros(1, 3, 8, 8), draws_of([0]))
    with pytest.raises(TypeError, match="wanted uint8"):
        transform(torch.zeros(3, 8, 8, dtype=torch.uint8), draws_of([0]))
    with pytest.raises(ValueError, match="2 draws for 1 images"):
        transform(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), draws_of([0, 1]))
    assert transform(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), []).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"flip": 1.5}, "flip"),
        ({"rotation": -1}, "rotation"),
        ({"erasing_area": (0.5, 0.1)}, "erasing_area"),
        ({"mirror": 0.5}, "mirror"),
    ],
)
def test_settings_out_of_range_are_named(settings, where):
    with pytest.raises(ValueError, match=where):
        AugmentationConfig(**settings)
