"""The renderer: pixels that depend on the image alone, and a truth that agrees with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gsalign.data.synthetic import BODY_PARTS, PARTS, SyntheticConfig
from gsalign.data.synthetic.identity import sample_appearances
from gsalign.data.synthetic.plan import plan_images
from gsalign.data.synthetic.raster import rasterise
from gsalign.data.synthetic.render import render

CONFIG = SyntheticConfig(
    seed=7,
    train_identities=6,
    test_identities=2,
    images_per_identity_aerial=5,
    images_per_identity_ground=5,
    write_parts=True,
)


@pytest.fixture(scope="module")
def rendered():
    specs = plan_images(CONFIG)
    people = sample_appearances(CONFIG.seed, 8)
    torch.set_num_threads(1)
    return specs, people, render(specs, people, CONFIG)


def test_pixels_do_not_depend_on_the_batch(rendered):
    specs, people, whole = rendered
    for start, stop in ((0, 1), (1, 4), (4, 9), (20, 27), (79, 80)):
        part = render(specs[start:stop], people, CONFIG)
        assert torch.equal(part.images, whole.images[start:stop])
        assert torch.equal(part.labels, whole.labels[start:stop])
        assert [t.path for t in part.truth] == [t.path for t in whole.truth[start:stop]]


def test_order_within_the_batch_does_not_matter(rendered):
    specs, people, whole = rendered
    turned = render(specs[:10][::-1], people, CONFIG)
    assert torch.equal(turned.images.flip(0), whole.images[:10])


def test_seed_changes_people_and_pixels(rendered):
    specs, people, whole = rendered
    other = CONFIG.model_copy(update={"seed": 8})
    assert sample_appearances(8, 8) != people
    again = render(specs[:2], people, other)
    assert not torch.equal(again.images, whole.images[:2])


def test_upright_cameras_see_the_same_people_without_roll(rendered):
    specs, people, whole = rendered
    upright = render(specs, people, CONFIG.model_copy(update={"aerial_roll": 0.0}))
    ground = torch.tensor([spec.view == 0 for spec in specs])
    assert torch.equal(upright.images[ground], whole.images[ground])
    for now, before in zip(upright.truth, whole.truth, strict=True):
        assert (now.path, now.elevation, now.heading) == (
            before.path,
            before.elevation,
            before.heading,
        )
        assert now.roll == (0.0 if now.view else before.roll)
    # Seen from the front or from the back, nobody lies on the side any more.
    tilted = [t for t in upright.truth if 2 <= t.camera <= 5]
    assert max(abs(t.body_angle) for t in tilted) < 30.0


def test_roll_keeps_to_its_range(rendered):
    specs, people, _ = rendered
    aerial = [spec for spec in specs if spec.view]
    some = render(aerial, people, CONFIG.model_copy(update={"aerial_roll": 40.0}))
    rolls = np.array([t.roll for t in some.truth])
    assert np.abs(rolls).max() <= 40.0 and rolls.min() < -10.0 and rolls.max() > 10.0


def test_size_and_type(rendered):
    specs, people, whole = rendered
    assert whole.images.shape == (len(specs), 128, 64, 3)
    assert whole.images.dtype == torch.uint8
    large = CONFIG.model_copy(update={"image_size": (192, 96)})
    result = render(specs[:2], people, large)
    assert result.images.shape == (2, 192, 96, 3)
    assert result.labels.shape == (2, 192, 96)


def test_images_are_neither_flat_nor_clipped(rendered):
    _, _, whole = rendered
    pixels = whole.images.numpy().astype(np.float32)
    assert (pixels.std(axis=(1, 2, 3)) > 5).all()
    assert ((pixels >= 255).mean(axis=(1, 2, 3)) < 0.3).all()
    assert (pixels.mean(axis=(1, 2, 3)) > 12).all()


def test_truth_is_in_range(rendered):
    specs, _, whole = rendered
    for spec, row in zip(specs, whole.truth, strict=True):
        assert (row.path, row.identity, row.camera) == (spec.path, spec.identity, spec.camera)
        assert row.view == int(row.camera <= 5)
        assert row.time == ("night" if spec.night else "day")
        assert (row.lighting in ("sodium", "led")) == spec.night
        assert 0.0 <= row.phase < 1.0
        assert 0.0 <= row.occluded_share < 1.0
        assert 0.0 <= row.heading < 360.0
        for part, share in row.visible.items():
            assert share == -1.0 if share < 0 else 0.0 <= share <= 1.0, (row.path, part)
            if part != "bag":
                assert share >= 0.0


def test_views(rendered):
    _, _, whole = rendered
    ground = [row for row in whole.truth if row.view == 0]
    aerial = [row for row in whole.truth if row.view == 1]
    assert max(abs(row.roll) for row in ground) <= 2.5
    assert max(abs(row.body_angle) for row in ground) < 30.0
    assert max(row.elevation for row in ground) <= 14.0
    assert min(row.elevation for row in aerial) >= 32.0
    assert all(row.elevation >= 76.0 for row in aerial if row.camera == 1)
    # Any heading: every quadrant of the roll occurs.
    quadrants = {int((row.roll + 180.0) // 90.0) % 4 for row in aerial}
    assert quadrants == {0, 1, 2, 3}


def test_roll_turns_the_body_in_the_image(rendered):
    _, _, whole = rendered
    tilted = [row for row in whole.truth if 2 <= row.camera <= 5 and row.elevation < 50.0]
    assert len(tilted) > 10
    for row in tilted:
        # The crop's stretch and the stride turn the body's axis a little further.
        difference = (row.body_angle - row.roll + 180.0) % 360.0 - 180.0
        assert abs(difference) < 35.0, row.path


def test_part_maps_agree_with_the_table(rendered):
    specs, people, whole = rendered
    labels = whole.labels.numpy()
    assert labels.max() < len(PARTS)
    occluder = PARTS.index("occluder")
    for index, row in enumerate(whole.truth):
        count = np.bincount(labels[index].ravel(), minlength=len(PARTS))
        for part in BODY_PARTS:
            pixels = count[PARTS.index(part)]
            if row.visible[part] <= 0.0:
                assert pixels <= 2, (row.path, part)
            elif row.visible[part] > 0.5 and part in ("torso", "legs"):
                assert pixels > 20, (row.path, part)
        if row.occluded_share > 0.02:
            assert count[occluder] > 0, row.path
        if people[specs[index].identity - 1].bag == 0:
            assert row.visible["bag"] == -1.0


def test_occlusion_share():
    specs = plan_images(CONFIG)[:12]
    people = sample_appearances(CONFIG.seed, 8)
    never = render(specs, people, CONFIG.model_copy(update={"occlusion_share": 0.0}))
    always = render(specs, people, CONFIG.model_copy(update={"occlusion_share": 1.0}))
    assert all(row.occluded_share == 0.0 for row in never.truth)
    occluded = [row.occluded_share for row in always.truth]
    assert np.mean([share > 0.0 for share in occluded]) > 0.8
    assert max(occluded) < 0.8
    for before, after in zip(never.truth, always.truth, strict=True):
        for part in BODY_PARTS:
            assert after.visible[part] <= before.visible[part] + 1e-6


def test_people_differ_in_what_can_be_seen():
    people = sample_appearances(0, 1200)
    assert len({person.look() for person in people}) == 1200
    # A longer list starts with the shorter one.
    assert sample_appearances(0, 40) == people[:40]


def test_colours_are_shared():
    people = sample_appearances(0, 300)
    for field in ("upper_colour", "lower_colour"):
        counts = np.bincount([getattr(p, field) for p in people], minlength=14)
        assert counts.min() >= 5 and counts.max() <= 60, field


def test_rasteriser_against_a_point_in_triangle_test():
    generator = torch.Generator().manual_seed(3)
    corners = torch.rand(2, 30, 3, generator=generator) * torch.tensor([40.0, 30.0, 5.0])
    corners = corners - torch.tensor([4.0, 3.0, -1.0])
    faces = torch.arange(30).view(10, 3)
    keep = torch.rand(2, 10, generator=generator) < 0.8
    two_sided = torch.ones(10, dtype=torch.bool)
    part = torch.arange(10) % 3
    hits = rasterise(corners, faces, keep, two_sided, part, 3, (24, 32))

    y, x = np.meshgrid(np.arange(24) + 0.5, np.arange(32) + 0.5, indexing="ij")
    expected = np.full((2, 24, 32), -1)
    silhouette = np.zeros((2, 3), dtype=int)
    for image in range(2):
        nearest = np.full((24, 32), np.inf)
        covered = np.zeros((3, 24, 32), dtype=bool)
        for face in range(10):
            if not keep[image, face]:
                continue
            a, b, c = corners[image, faces[face]].numpy().astype(np.float64)
            area = (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
            wb = ((x - a[0]) * (c[1] - a[1]) - (y - a[1]) * (c[0] - a[0])) / area
            wc = ((b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0])) / area
            inside = (wb >= 0) & (wc >= 0) & (wb + wc <= 1)
            depth = a[2] * (1 - wb - wc) + b[2] * wb + c[2] * wc
            front = inside & (depth < nearest)
            nearest[front] = depth[front]
            expected[image][front] = face
            covered[face % 3] |= inside
        silhouette[image] = covered.sum((1, 2))
    found = np.full(2 * 24 * 32, -1)
    found[hits.pixel.numpy()] = hits.face.numpy()
    found = found.reshape(2, 24, 32)
    # Edges may fall either way within a thousandth of a pixel.
    assert (found != expected).mean() < 0.004
    assert np.abs(hits.silhouette.numpy() - silhouette).max() <= 3
    assert torch.allclose(hits.weights.sum(1), torch.ones(len(hits.weights)))
    assert (hits.weights >= -1e-6).all()
    assert torch.equal(hits.image, hits.pixel // (24 * 32))
