"""Embedding maps: where points lie, which are chosen, and what is said of them."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from drawn import colours, texts

from gsalign.evaluation import Features
from gsalign.extras import MissingExtraError
from gsalign.model import PartEmbeddings
from gsalign.visualize import embedding_map
from gsalign.visualize import projection as projection_module
from gsalign.visualize.embedding_map import choose_images, choose_people
from gsalign.visualize.projection import project


@pytest.fixture
def no_sklearn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)


def features(identities, views, *, parts: int = 0, seed: int = 0) -> Features:
    """Embeddings that lie around a centre for each identity."""
    generator = torch.Generator().manual_seed(seed)
    identities, views = np.asarray(identities, np.int64), np.asarray(views, np.int64)
    count = len(identities)
    slots = (1 + parts,) if parts else ()
    vectors = 0.1 * torch.randn(count, *slots, 8, generator=generator)
    vectors[torch.arange(count), ..., torch.from_numpy(identities % 8)] += 1.0
    return Features(
        embeddings=torch.nn.functional.normalize(vectors, dim=-1),
        identities=identities,
        cameras=np.arange(count, dtype=np.int64),
        views=views,
        indices=np.arange(count, dtype=np.int64),
        paths=tuple(f"{place}.jpg" for place in range(count)),
        visibility=torch.rand(count, *slots, generator=generator) if parts else None,
    )


def test_principal_components_are_those_of_the_unit_vectors():
    vectors = torch.randn(20, 5, dtype=torch.float64) * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1])
    made = project(7 * vectors, method="pca")
    unit = torch.nn.functional.normalize(vectors, dim=1)
    covariance = torch.cov(unit.T, correction=0)
    values, directions = torch.linalg.eigh(covariance)
    wanted = ((unit - unit.mean(0)) @ directions.flip(1)[:, :2]).numpy()
    wanted *= np.sign(wanted[np.abs(wanted).argmax(axis=0), [0, 1]])
    np.testing.assert_allclose(made.points, wanted, atol=1e-12)
    share = float(values[-1] / values.sum())
    assert made.axes[0] == f"component 1 ({share:.0%} of the variance)"


def test_vectors_on_a_line_have_one_component():
    made = project(torch.tensor([[1.0], [1.0], [-1.0]]), method="pca")
    assert made.points.shape == (3, 2) and (made.points[:, 1] == 0).all()


def test_tsne_is_asked_for_cosine_and_a_perplexity_that_fits(monkeypatch):
    asked = []

    def tsne(dimensions, **settings):
        asked.append((dimensions, settings))
        return SimpleNamespace(fit_transform=lambda x: x[:, :dimensions].astype(np.float32))

    def module(name, extra):
        assert (name, extra) == ("sklearn.manifold", "visualize")
        return SimpleNamespace(TSNE=tsne)

    monkeypatch.setattr(projection_module, "import_extra", module)
    for count, wanted in ((4, 1.0), (31, 10.0), (400, 30.0)):
        made = project(torch.randn(count, 3), seed=5)
        dimensions, settings = asked[-1]
        assert dimensions == 2 and settings["metric"] == "cosine"
        assert settings["random_state"] == 5 and settings["perplexity"] == pytest.approx(wanted)
        assert made.points.dtype == np.float64 and made.axes == ()
        assert f"perplexity {wanted:.3g}" in made.name


def test_tsne_keeps_people_together_and_repeats():
    pytest.importorskip("sklearn.manifold")
    made = features(np.repeat(np.arange(4), 10), np.zeros(40))
    first, again = (project(made.embeddings, method="tsne", seed=1) for _ in range(2))
    np.testing.assert_array_equal(first.points, again.points)
    distances = np.linalg.norm(first.points[:, None] - first.points[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    assert (made.identities[distances.argmin(axis=1)] == made.identities).all()
    assert project(torch.randn(4, 3), method="tsne").points.shape == (4, 2)


def test_without_scikit_learn_components_are_drawn_and_the_log_says_why(no_sklearn, caplog):
    vectors = torch.randn(6, 4)
    with caplog.at_level(logging.INFO):
        made = project(vectors)
    assert "pip install 'gsalign[visualize]'" in caplog.text
    np.testing.assert_array_equal(made.points, project(vectors, method="pca").points)
    with pytest.raises(MissingExtraError, match=r"gsalign\[visualize\]"):
        project(vectors, method="tsne")


@pytest.mark.parametrize(
    ("vectors", "method", "told"),
    [
        (torch.zeros(2, 4), None, "at least 3"),
        (torch.zeros(4), None, r"\[N, D\]"),
        (torch.zeros(4, 4), "umap", "'umap'; wanted one of tsne, pca"),
    ],
)
def test_what_cannot_be_projected_is_refused(vectors, method, told):
    with pytest.raises(ValueError, match=told):
        project(vectors, method=method)


def test_images_are_spread_over_people_and_views():
    identities = np.repeat(np.arange(5), 40)
    views = np.tile([0] * 30 + [1] * 10, 5)
    chosen = choose_images(identities, views, 30)
    assert len(set(chosen.tolist())) == 30 and (np.diff(chosen) > 0).all()
    groups = {(i, v): 0 for i in range(5) for v in (0, 1)}
    for place in chosen:
        groups[identities[place], views[place]] += 1
    assert set(groups.values()) == {3}
    assert np.array_equal(chosen, choose_images(identities, views, 30))
    assert not np.array_equal(chosen, choose_images(identities, views, 30, seed=1))
    # Not enough for everybody: whole people, both views of each.
    few = choose_images(identities, views, 4)
    assert len(np.unique(identities[few])) == 2 and sorted(views[few]) == [0, 0, 1, 1]
    assert choose_images(identities, views, 1000).tolist() == list(range(200))


def test_people_of_both_views_are_coloured_first():
    identities = np.array([1, 1, 1, 2, 2, 3, 3, 3, 3, -1, -1, -1, -1])
    views = np.array([0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0, 1, 1])
    assert choose_people(identities, views, 1) == [3]
    assert choose_people(identities, views, 2) == [2, 3]
    assert choose_people(identities, views, 9) == [1, 2, 3]


def test_the_map_shows_every_image_in_both_panels(tmp_path, panels, no_sklearn):
    query = features([0, 1, 2, 2], [0, 1, 0, 1])
    gallery = features(np.repeat(np.arange(9), 4), np.tile([0, 1], 18), seed=1)
    path = tmp_path / "map.png"
    embedding_map(query, gallery, path, names={0: "Ada"}, title="map")
    assert len(colours(path)) > 50
    (figure,) = panels
    left, right = figure.axes
    drawn = [np.concatenate([c.get_offsets() for c in axes.collections]) for axes in (left, right)]
    wanted = project(torch.cat([query.embeddings, gallery.embeddings])).points
    for points in drawn:
        np.testing.assert_allclose(np.sort(points, axis=0), np.sort(wanted, axis=0))
    told = texts(figure)
    assert {"map", "By view", "ground query", "aerial gallery", "id Ada", "id 1"} <= set(told)
    assert any(text.startswith("40 query and gallery images; principal") for text in told)
    # 7 of 9 people have a colour, each another.
    assert "By identity, 7 of 9" in told
    people = [text for text in told if text.startswith("id ")]
    handles = {matplotlib.colors.to_hex(h.get_facecolor()[0]) for h in right.legend_.legend_handles}
    assert len(people) == len(handles) == 7


def test_many_images_are_thinned_and_the_picture_says_so(tmp_path, panels, no_sklearn):
    gallery = features(np.repeat(np.arange(9), 4), np.tile([0, 1], 18), seed=1)
    embedding_map(features([0], [0]), gallery, tmp_path / "map.png", images=18)
    left, _ = panels[0].axes
    assert sum(len(c.get_offsets()) for c in left.collections) == 18
    told = " ".join(texts(panels[0]))
    assert "18 of 37 query and gallery images, spread over people" in told


def test_parts_are_drawn_as_they_are_searched(tmp_path, panels, no_sklearn):
    query, gallery = (features([0, 1, 2], [0, 1, 0], parts=2, seed=s) for s in (0, 1))
    embedding_map(query, gallery, tmp_path / "map.png")
    flat = torch.cat([PartEmbeddings(f.embeddings, f.visibility).flat() for f in (query, gallery)])
    points = np.concatenate([c.get_offsets() for c in panels[0].axes[0].collections])
    np.testing.assert_allclose(np.sort(points, 0), np.sort(project(flat).points, 0))


def test_too_few_images_are_refused(tmp_path):
    one = features([0], [0])
    with pytest.raises(ValueError, match="at least 3"):
        embedding_map(one, one, tmp_path / "map.png")
    with pytest.raises(ValueError, match="images is 2; wanted at least 3"):
        embedding_map(one, one, tmp_path / "map.png", images=2)
    assert not (tmp_path / "map.png").exists()
