from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from gsalign.data import Batch, ImageRecord, Split, normalize
from gsalign.errors import ConfigError, DataError
from gsalign.evaluation import (
    PROTOCOLS,
    chance_level,
    embed_batch,
    embed_parts_batch,
    evaluate,
    evaluate_features,
    evaluate_protocols,
    extract_features,
    feature_distances,
    histogram_features,
    results_dict,
    results_table,
)
from gsalign.evaluation.baselines import _expected
from gsalign.model import GSAlign, ModelConfig


def batches(count=10, size=4, seed=0):
    pixels = torch.randint(
        0, 256, (count, 3, 8, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    for start in range(0, count, size):
        indices = torch.arange(start, min(start + size, count))
        yield Batch(
            images=normalize(pixels[indices]),
            identities=indices // 2 + 100,
            views=indices % 2,
            cameras=torch.where(indices % 2 == 1, 2, 8),
            indices=indices,
            paths=tuple(f"{index}.jpg" for index in indices.tolist()),
        )


class Network(nn.Module):
    """An embedding that depends on the mode, as batch norm and dropout do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3 * 8 * 6, 5)
        self.dropout = nn.Dropout(0.5)

    def embed(self, images):
        return self.linear(self.dropout(images.flatten(1)))

    def forward(self, images):
        raise AssertionError("embed is there and must be used")


def test_features_keep_order_labels_and_mode():
    model = Network().train()
    features = extract_features(model, batches(), normalize=False)
    assert model.training and model.dropout.training
    assert len(features) == 10
    assert features.embeddings.dtype == torch.float32
    assert features.identities.tolist() == [100 + i // 2 for i in range(10)]
    assert features.views.tolist() == [0, 1] * 5
    assert features.cameras.tolist() == [8, 2] * 5
    assert features.indices.tolist() == list(range(10))
    assert features.paths == tuple(f"{i}.jpg" for i in range(10))
    images = torch.cat([batch.images for batch in batches()])
    wanted = model.linear(images.flatten(1))
    assert torch.allclose(features.embeddings, wanted, atol=1e-6)
    assert not features.embeddings.is_inference()


def test_embeddings_are_normalised_once_at_the_end():
    model = Network().eval()
    raw = extract_features(model, batches(), normalize=False, flip_test="mean").embeddings
    unit = extract_features(model, batches(), flip_test="mean").embeddings
    assert torch.allclose(unit, nn.functional.normalize(raw, dim=1), atol=1e-6)
    images = torch.cat([batch.images for batch in batches()])
    with torch.no_grad():
        mean = (model.embed(images) + model.embed(images.flip(-1))) / 2
    assert torch.allclose(raw, mean, atol=1e-6)
    # Normalising both before adding gives something else.
    both = [nn.functional.normalize(model.embed(x), dim=1) for x in (images, images.flip(-1))]
    assert not torch.allclose(unit, nn.functional.normalize(sum(both), dim=1), atol=1e-4)


def test_the_published_flip_test_adds_nearly_the_same_to_every_embedding():
    model = Network().eval()
    images = next(batches()).images
    kept = images.clone()
    with torch.no_grad():
        plain = model.embed(images)
        published = embed_batch(model.embed, images, "published")
        twice = (images.flip(-1) - 127.5) / 127.5
        assert torch.allclose(published, (plain + model.embed(twice)) / 2, atol=1e-6)
        added = 2 * published - plain
        mean = 2 * embed_batch(model.embed, images, "mean") - plain
    assert (added.std(0) < 0.02 * mean.std(0)).all()
    assert torch.equal(images, kept)
    with pytest.raises(ConfigError, match="flip_test is 'on'"):
        embed_batch(model.embed, images, "on")


def test_a_plain_function_and_a_module_without_embed_will_do():
    features = extract_features(lambda images: images.mean((2, 3)), batches(), normalize=False)
    images = torch.cat([batch.images for batch in batches()])
    assert torch.allclose(features.embeddings, images.mean((2, 3)))
    flat = nn.Sequential(nn.Flatten(), nn.Linear(144, 3))
    assert extract_features(flat, batches()).embeddings.shape == (10, 3)


def test_autocast_gives_float32_embeddings_near_those_without():
    model = Network()
    wanted = extract_features(model, batches()).embeddings
    features = extract_features(model, batches(), autocast=torch.bfloat16).embeddings
    assert features.dtype == torch.float32
    assert (features - wanted).abs().max() < 0.03
    assert not torch.equal(features, wanted)


def test_progress_and_failures():
    done = []
    extract_features(Network(), batches(), progress=done.append)
    assert done == [4, 8, 10]
    with pytest.raises(DataError, match="loader is empty"):
        extract_features(Network(), [])
    model = Network().train()

    def broken(images):
        embeddings = images.flatten(1)[:, :4].clone()
        embeddings[1, 2] = math.nan
        return embeddings

    model.embed = broken
    with pytest.raises(DataError, match=r"embedding of 1\.jpg is not finite"):
        extract_features(model, batches())
    assert model.training


def split_of(name, rows, paths=None):
    """A split from (identity, camera) rows."""
    return Split(
        name,
        tuple(
            ImageRecord(paths[i] if paths else f"{name}{i}.jpg", identity, camera, int(camera <= 5))
            for i, (identity, camera) in enumerate(rows)
        ),
    )


def test_expected_scores_against_all_orders():
    for size, positives in [(1, 1), (4, 1), (5, 2), (6, 3), (6, 6)]:
        scores = []
        for ranks in itertools.combinations(range(1, size + 1), positives):
            precision = sum((k + 1) / rank for k, rank in enumerate(ranks)) / positives
            first = [ranks[0] <= k for k in range(1, size + 1)]
            scores.append((precision, positives / ranks[-1], *first))
        wanted = np.mean(scores, axis=0)
        cmc, ap, inp = _expected(positives, size)
        assert ap == pytest.approx(wanted[0])
        assert inp == pytest.approx(wanted[1])
        assert cmc[:size] == pytest.approx(wanted[2:])
        assert cmc[size:] == pytest.approx(1.0)


def test_chance_level_is_what_random_distances_score_on_average():
    random = np.random.default_rng(0)
    query = split_of("query", random.integers((0, 1), (9, 14), (60, 2)).tolist())
    gallery = split_of("gallery", random.integers((0, 1), (12, 14), (200, 2)).tolist())
    labels = {
        f"{side}_{column}": getattr(split, column)
        for side, split in (("query", query), ("gallery", gallery))
        for column in ("identities", "cameras", "views")
    }
    runs = [evaluate_protocols(random.random((60, 200)), **labels) for _ in range(40)]
    for name in PROTOCOLS:
        chance = chance_level(query, gallery, name)
        assert chance.num_queries == runs[0][name].num_queries
        assert chance.num_valid_queries == runs[0][name].num_valid_queries
        assert chance.num_gallery == runs[0][name].num_gallery
        for score, wanted in (
            ([run[name].mAP for run in runs], chance.mAP),
            ([run[name].mINP for run in runs], chance.mINP),
            ([run[name].rank(10) for run in runs], chance.cmc[9]),
        ):
            error = np.std(score) / math.sqrt(len(score))
            assert abs(np.mean(score) - wanted) < 5 * error, name


def test_chance_without_valid_queries_has_no_figures():
    chance = chance_level(split_of("query", [(1, 1)]), split_of("gallery", [(2, 1)]))
    assert chance.num_valid_queries == 0
    assert chance.as_dict()["mAP"] is None


def colour_split(tmp_path, name, rows):
    colours = {1: (200, 30, 30), 2: (30, 200, 30), 3: (30, 30, 200)}
    paths = []
    for i, (identity, camera) in enumerate(rows):
        pixels = np.empty((20, 10, 3), dtype=np.uint8)
        pixels[:] = colours[identity]
        pixels += np.random.default_rng(i * 14 + camera).integers(0, 20, pixels.shape).astype("u1")
        path = tmp_path / f"{name}{i}.png"
        Image.fromarray(pixels).save(path)
        paths.append(path)
    return split_of(name, rows, paths)


def test_a_colour_histogram_finds_people_by_their_colours(tmp_path):
    query = colour_split(tmp_path, "query", [(1, 1), (2, 7), (3, 1)])
    gallery = colour_split(tmp_path, "gallery", [(i, c) for i in (1, 2, 3) for c in (2, 8)])
    features = histogram_features(gallery, image_size=(16, 8), stripes=4, bins=8)
    assert features.embeddings.shape == (6, 4 * 3 * 8)
    assert torch.allclose(features.embeddings.norm(dim=1), torch.ones(6))
    asked = histogram_features(query, image_size=(16, 8), stripes=4, bins=8)
    results = evaluate_features(asked, features)
    assert results["all"].mAP == 1.0
    assert results["aerial-ground-vdt"].rank1 == 1.0
    with pytest.raises(ValueError, match="stripes is 0"):
        histogram_features(query, stripes=0)


def test_stripes_tell_top_from_bottom(tmp_path):
    halves = np.zeros((20, 10, 3), dtype=np.uint8)
    halves[:10] = 250
    Image.fromarray(halves).save(tmp_path / "a.png")
    Image.fromarray(halves[::-1].copy()).save(tmp_path / "b.png")
    split = split_of("query", [(1, 1), (1, 2)], [tmp_path / "a.png", tmp_path / "b.png"])
    for stripes, alike in ((1, True), (2, False)):
        one, two = histogram_features(split, image_size=(20, 10), stripes=stripes).embeddings
        assert (torch.dot(one, two) > 0.99) == alike


def test_the_result_table_is_complete_in_80_columns():
    rows = [(i // 2 % 20, c) for i, c in enumerate([2, 8] * 60)]
    query, gallery = split_of("query", rows[:40]), split_of("gallery", rows)
    results = {name: chance_level(query, gallery, name) for name in PROTOCOLS}
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    console.print(results_table(results, dataset="CARGO"))
    text = console.export_text()
    assert "\u2026" not in text  # nothing was cut off
    heading, _, *lines = text.splitlines()
    assert heading.split() == [
        "Dataset", "Rank-1", "Rank-5", "Rank-10", "mAP", "mINP", "metric", "valid/asked",
    ]  # fmt: skip
    assert len(lines) == 6
    summary = results["aerial-ground-vdt"].as_dict()
    (line,) = [line for line in lines if "(VDT)" in line]
    assert line.split()[-2:] == [
        f"{summary['metric']:.2f}",
        f"{summary['valid_queries']}/{summary['queries']}",
    ]
    assert results_dict(results)["all"] == results["all"].as_dict()
    assert "-" in results_table({"x": {"valid_queries": 0, "queries": 2}}).columns[1]._cells


@pytest.fixture
def parted() -> GSAlign:
    torch.manual_seed(0)
    return GSAlign(
        ModelConfig(
            image_size=(8, 6), patch_size=2, width=8, depth=1, num_heads=2, num_identities=3,
            parts=2, ltps={"layers": ()},
        )
    )  # fmt: skip


def test_a_network_with_parts_gives_those_too(parted):
    features = extract_features(parted, batches())
    images = torch.cat([batch.images for batch in batches()])
    with torch.no_grad():
        wanted = parted.embed_parts(images)
    assert features.embeddings.shape == (10, 3, 8) and features.visibility.shape == (10, 3)
    assert torch.allclose(features.visibility, wanted.visibility, atol=1e-6)
    unit = nn.functional.normalize(wanted.vectors, dim=2)
    assert torch.allclose(features.embeddings, unit, atol=1e-5)

    both = [parted.embed_parts(x) for x in (images, images.flip(-1))]
    mean = embed_parts_batch(parted.embed_parts, images, "mean")
    for name in ("vectors", "visibility"):
        average = (getattr(both[0], name) + getattr(both[1], name)) / 2
        assert torch.allclose(getattr(mean, name), average, atol=1e-6)
    with pytest.raises(ConfigError, match="flip_test is 'on'"):
        embed_parts_batch(parted.embed_parts, images, "on")


def test_features_with_parts_are_compared_by_visible_parts(parted):
    features = extract_features(parted, batches())
    # Parts 1 and 2 of some images are hidden, and what their vectors hold must not matter.
    hidden = features.visibility.clone()
    hidden[::2, 1:] = 0.0
    spoilt = features.embeddings.clone()
    spoilt[::2, 1:] = 7.0
    changed = dataclasses.replace(features, embeddings=spoilt, visibility=hidden)
    distances = feature_distances(changed, changed, slice(0, 10))
    unit = features.embeddings.double()
    cosines = torch.einsum("apc,bpc->abp", unit, unit)
    weights = (hidden.double().unsqueeze(1) * hidden.double().unsqueeze(0)).sqrt()
    wanted = (weights * (1 - cosines)).sum(dim=2) / weights.sum(dim=2)
    assert torch.allclose(distances.double(), wanted, atol=1e-5)
    # The same through the public entrance, in blocks of one row.
    labels = {
        "query_identities": features.identities, "gallery_identities": features.identities,
        "query_cameras": features.cameras, "gallery_cameras": features.cameras,
        "query_views": features.views, "gallery_views": features.views,
    }  # fmt: skip
    ours = evaluate_features(changed, changed, protocols=["all"])["all"]
    theirs = evaluate(wanted.float(), **labels)
    assert np.array_equal(ours.average_precision, theirs.average_precision)
    small = evaluate(
        query=spoilt, gallery=spoilt, query_visibility=hidden, gallery_visibility=hidden,
        block_bytes=1, **labels,
    )  # fmt: skip
    assert np.array_equal(ours.average_precision, small.average_precision)


def test_visibilities_come_in_pairs(parted):
    features = extract_features(parted, batches())
    labels = {
        "query_identities": features.identities, "gallery_identities": features.identities,
        "query_cameras": features.cameras, "gallery_cameras": features.cameras,
    }  # fmt: skip
    with pytest.raises(ValueError, match="query_visibility and gallery_visibility"):
        evaluate(
            query=features.embeddings, gallery=features.embeddings,
            query_visibility=features.visibility, **labels,
        )  # fmt: skip
    with pytest.raises(ValueError, match="either distances, or query and gallery"):
        evaluate(
            np.zeros((10, 10)), query_visibility=features.visibility,
            gallery_visibility=features.visibility, **labels,
        )  # fmt: skip
