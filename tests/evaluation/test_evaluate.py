from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
import torch
from scalar_ranking import score_query

from gsalign.errors import ConfigError, DataError
from gsalign.evaluation import (
    PROTOCOLS,
    Protocol,
    distance_blocks,
    evaluate,
    evaluate_protocols,
    get_protocol,
    pairwise_distances,
)
from gsalign.evaluation.metrics import (
    average_precision,
    cumulative_matching,
    inverse_negative_penalty,
)


def test_scores_computed_by_hand():
    assert average_precision([1, 2, 3]) == 1.0
    assert average_precision([2, 4]) == (1 / 2 + 2 / 4) / 2
    assert inverse_negative_penalty([1, 2, 8]) == 3 / 8
    curve = cumulative_matching([1, 3, 3, 60], max_rank=50)
    assert curve.shape == (50,)
    assert curve[:4].tolist() == [0.25, 0.25, 0.75, 0.75]
    assert curve[-1] == 0.75
    assert np.isnan(cumulative_matching([], 5)).all()


def test_a_retrieval_computed_by_hand():
    result = evaluate(
        distances=np.array([[0.1, 0.2, 0.3], [0.1, 0.2, 0.3], [0.1, 0.2, 0.3]]),
        query_identities=[1, 2, 9],
        gallery_identities=[2, 1, 2],
        query_cameras=[0, 0, 0],
        gallery_cameras=[1, 1, 2],
    )
    assert result.protocol == "all"
    assert (result.num_queries, result.num_valid_queries, result.num_gallery) == (3, 2, 3)
    assert result.valid.tolist() == [True, True, False]
    assert result.first_rank.tolist() == [2, 1, 0]
    assert result.rank1 == 0.5
    assert result.rank(5) == 1.0
    assert result.mAP == pytest.approx((1 / 2 + (1 + 2 / 3) / 2) / 2)
    assert result.mINP == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert result.metric == pytest.approx((result.mAP + 0.5) / 2)
    assert result.query_indices.tolist() == [0, 1, 2]
    summary = result.as_dict()
    assert summary["Rank-1"] == 50.0
    assert summary["mAP"] == pytest.approx(100 * result.mAP)
    assert (summary["queries"], summary["valid_queries"]) == (3, 2)
    with pytest.raises(ValueError, match="k is 51"):
        result.rank(51)


def test_no_valid_query_gives_no_figures_and_valid_json():
    result = evaluate(
        distances=np.zeros((2, 1)),
        query_identities=[1, 2],
        gallery_identities=[3],
        query_cameras=[0, 0],
        gallery_cameras=[0],
    )
    assert result.num_valid_queries == 0
    assert np.isnan(result.mAP)
    text = json.dumps(result.as_dict(), allow_nan=False)
    assert json.loads(text)["Rank-1"] is None


# Two people: 1 is seen by aerial camera 2 and ground camera 7, 2 by aerial camera 2 and aerial
# camera 3. The gallery also holds a stranger in each view. Columns:
#            g0 person 1   g1 person 1   g2 person 2   g3 person 2   g4 stranger   g5 stranger
#            aerial cam 2  ground cam 7  aerial cam 3  aerial cam 2  aerial cam 4  ground cam 8
GALLERY = {
    "gallery_identities": [1, 1, 2, 2, 50, 51],
    "gallery_cameras": [2, 7, 3, 2, 4, 8],
    "gallery_views": [1, 0, 1, 1, 1, 0],
}
# q0: person 1, aerial camera 2. q1: person 1, ground camera 9. q2: person 2, aerial camera 2.
QUERY = {
    "query_identities": [1, 1, 2],
    "query_cameras": [2, 9, 2],
    "query_views": [1, 0, 1],
}
DISTANCES = np.array(
    [
        [0.0, 0.5, 0.3, 0.4, 0.1, 0.6],
        [0.7, 0.4, 0.3, 0.8, 0.1, 0.2],
        [0.2, 0.3, 0.5, 0.0, 0.4, 0.6],
    ]
)

# Positives' ranks per query, by hand; [] means the query has none and does not count.
BY_HAND = {
    # q0: g0 left out; g1 after g4, g2, g3. q1: g1 after g4, g5, g2; g0 after those and g1.
    # q2: g3 left out; g2 after g0, g1, g4.
    "all": {0: [4], 1: [4, 5], 2: [4]},
    # Only q1 is ground; among g1 and g5 the positive g1 comes second.
    "ground-ground": {1: [2]},
    # q0's only aerial image g0 is of its own camera. q2: g2 among g0, g2, g4 comes third.
    "aerial-aerial": {0: [], 2: [3]},
    # q0: g0 left out (its view), strangers and person 2 stay. q1: g1 left out (its view).
    # q2: both images of person 2 are aerial.
    "aerial-ground-vdt": {0: [4], 1: [4], 2: []},
    # Ground gallery g1, g5.
    "aerial-to-ground": {0: [1], 2: []},
    # Aerial gallery g0, g2, g3, g4.
    "ground-to-aerial": {1: [3]},
}


@pytest.mark.parametrize("ranker", ["numpy", "cpp"])
@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_protocols_computed_by_hand(compiled, name, ranker):
    result = evaluate(DISTANCES, **QUERY, **GALLERY, protocol=name, ranker=ranker)
    wanted = BY_HAND[name]
    assert result.protocol == name
    assert result.query_indices.tolist() == list(wanted)
    assert result.num_queries == len(wanted)
    assert result.num_valid_queries == sum(bool(ranks) for ranks in wanted.values())
    for place, ranks in enumerate(wanted.values()):
        assert result.num_positives[place] == len(ranks)
        if ranks:
            assert result.first_rank[place] == ranks[0]
            assert result.average_precision[place] == average_precision(ranks)
            assert result.inp[place] == inverse_negative_penalty(ranks)


def test_all_six_protocols_are_there_and_unknown_ones_are_not():
    assert set(PROTOCOLS) == set(BY_HAND)
    with pytest.raises(ConfigError, match=r"'A2G' is unknown; there are all, ground-ground"):
        get_protocol("A2G")
    results = evaluate_protocols(DISTANCES, **QUERY, **GALLERY)
    assert list(results) == list(PROTOCOLS)


def test_a_protocol_of_ones_own():
    mine = Protocol("aerial-to-all", "A->all", 1, None, False, "Aerial queries ask everything.")
    result = evaluate(DISTANCES, **QUERY, **GALLERY, protocol=mine)
    assert result.query_indices.tolist() == [0, 2]
    assert result.first_rank.tolist() == [4, 4]


def random_retrieval(seed=0, queries=40, gallery=150, width=8):
    random = np.random.default_rng(seed)
    labels = {
        "query_identities": random.integers(0, 12, queries),
        "gallery_identities": random.integers(0, 14, gallery),
        "query_cameras": random.integers(1, 14, queries),
        "gallery_cameras": random.integers(1, 14, gallery),
    }
    labels["query_views"] = (labels["query_cameras"] <= 5).astype(int)
    labels["gallery_views"] = (labels["gallery_cameras"] <= 5).astype(int)
    embeddings = {
        "query": random.normal(size=(queries, width)),
        "gallery": random.normal(size=(gallery, width)),
    }
    return embeddings, labels


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_protocols_agree_with_scalar_code(metric):
    embeddings, labels = random_retrieval()
    q, g = embeddings["query"], embeddings["gallery"]
    if metric == "cosine":
        distances = (
            1
            - (q / np.linalg.norm(q, axis=1, keepdims=True))
            @ (g / np.linalg.norm(g, axis=1, keepdims=True)).T
        )
    else:
        distances = np.linalg.norm(q[:, None] - g[None], axis=2)
    results = evaluate_protocols(**embeddings, **labels, metric=metric)
    views = {"ground-ground": (0, 0), "aerial-aerial": (1, 1), "aerial-to-ground": (1, 0),
             "ground-to-aerial": (0, 1)}  # fmt: skip
    for name, result in results.items():
        query_view, gallery_view = views.get(name, (None, None))
        asked = [
            i for i in range(len(q))
            if query_view is None or labels["query_views"][i] == query_view
        ]  # fmt: skip
        searched = [
            j for j in range(len(g))
            if gallery_view is None or labels["gallery_views"][j] == gallery_view
        ]  # fmt: skip
        camera = "views" if name == "aerial-ground-vdt" else "cameras"
        scores = [
            score_query(
                distances[i, searched].tolist(),
                labels["query_identities"][i],
                labels[f"query_{camera}"][i],
                labels["gallery_identities"][searched].tolist(),
                labels[f"gallery_{camera}"][searched].tolist(),
            )
            for i in asked
        ]
        valid = [score for score in scores if score[0]]
        assert result.num_queries == len(asked)
        assert result.num_valid_queries == len(valid)
        assert result.num_gallery == len(searched)
        assert result.mAP == pytest.approx(np.mean([score[2] for score in valid]))
        assert result.mINP == pytest.approx(np.mean([score[3] for score in valid]))
        for k in (1, 5, 10, 50):
            wanted = np.mean([score[1] <= k for score in valid])
            assert result.rank(k) == pytest.approx(wanted)


def test_blocks_change_nothing():
    embeddings, labels = random_retrieval()
    whole = evaluate_protocols(**embeddings, **labels)
    for block_bytes in (1, 5000, 20_000):
        parts = evaluate_protocols(**embeddings, **labels, block_bytes=block_bytes)
        for name, result in whole.items():
            np.testing.assert_array_equal(parts[name].first_rank, result.first_rank)
            np.testing.assert_array_equal(parts[name].average_precision, result.average_precision)


def test_distances_and_embeddings_arrays_and_tensors_give_the_same():
    embeddings, labels = random_retrieval()
    wanted = evaluate(**embeddings, **labels)
    distances = pairwise_distances(embeddings["query"], embeddings["gallery"])
    tensors = {name: torch.from_numpy(value) for name, value in labels.items()}
    for result in (
        evaluate(distances, **labels),
        evaluate(distances.numpy(), **tensors),
        evaluate(
            query=torch.from_numpy(embeddings["query"]).requires_grad_(),
            gallery=torch.from_numpy(embeddings["gallery"]),
            **tensors,
        ),
    ):
        np.testing.assert_array_equal(result.average_precision, wanted.average_precision)


def test_half_precision_distances_are_accepted():
    _, labels = random_retrieval()
    distances = torch.rand(40, 150, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float16, torch.bfloat16):
        rounded = distances.to(dtype)
        one = evaluate(rounded, **labels)
        np.testing.assert_array_equal(
            one.first_rank, evaluate(rounded.double(), **labels).first_rank
        )


def test_memory_stays_at_a_few_blocks_of_rows():
    queries, gallery = 400, 5000
    random = np.random.default_rng(0)
    block_bytes = 20 * gallery * 4
    tracemalloc.start()
    try:
        distances = random.random((queries, gallery), dtype=np.float32)
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        evaluate_protocols(
            distances,
            query_identities=random.integers(0, 250, queries),
            gallery_identities=random.integers(0, 250, gallery),
            query_cameras=random.integers(1, 14, queries),
            gallery_cameras=random.integers(1, 14, gallery),
            query_views=random.integers(0, 2, queries),
            gallery_views=random.integers(0, 2, gallery),
            block_bytes=block_bytes,
        )
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert peak < 4 * block_bytes < distances.nbytes / 4


def test_nan_names_query_and_gallery_image():
    embeddings, labels = random_retrieval()
    embeddings["query"][33] = np.nan
    with pytest.raises(DataError, match="distance of query 33 to gallery image 0 is NaN"):
        evaluate(**embeddings, **labels, block_bytes=5000)
    distances = np.random.default_rng(0).random((40, 150))
    aerial = int(np.flatnonzero(labels["gallery_views"] == 1)[4])
    row = int(np.flatnonzero(labels["query_views"] == 1)[3])
    distances[row, aerial] = np.nan
    with pytest.raises(DataError, match=f"query {row} to gallery image {aerial} is NaN"):
        evaluate(distances, **labels, protocol="aerial-aerial")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distances": None}, "give distances, or both query and gallery"),
        ({"distances": None, "query": np.zeros((3, 2))}, "give distances, or both"),
        ({"query": np.zeros((3, 2))}, "not both"),
        ({"distances": np.zeros(3)}, r"distances has shape \(3,\); wanted \[Q, G\]"),
        ({"query_identities": [1, 2]}, r"query_identities has shape \(2,\); wanted \(3,\)"),
        ({"gallery_cameras": [1.5] * 6}, "gallery_cameras is float64; wanted integers"),
        ({"query_views": None}, "protocol 'aerial-aerial' needs query_views and gallery_views"),
        ({"max_rank": 0}, "max_rank is 0"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    arguments = {"distances": DISTANCES, "protocol": "aerial-aerial", **QUERY, **GALLERY}
    with pytest.raises(ValueError, match=message):
        evaluate(**(arguments | changes))


def test_all_needs_no_views():
    labels = {
        name: value for name, value in {**QUERY, **GALLERY}.items() if not name.endswith("views")
    }
    assert evaluate(DISTANCES, **labels).num_valid_queries == 3


def test_cosine_and_euclidean_distances_against_float64():
    random = np.random.default_rng(1)
    q = random.normal(size=(7, 33)).astype(np.float32)
    g = (random.normal(size=(11, 33)) * 5).astype(np.float32)
    cosine = pairwise_distances(q, g)
    q64, g64 = q.astype(np.float64), g.astype(np.float64)
    lengths = np.linalg.norm(q64, axis=1)[:, None] * np.linalg.norm(g64, axis=1)[None]
    assert cosine.dtype == torch.float32
    np.testing.assert_allclose(cosine, 1 - q64 @ g64.T / lengths, atol=1e-6)
    euclidean = pairwise_distances(q, g, "euclidean")
    assert euclidean.dtype == torch.float32
    wanted = np.linalg.norm(q64[:, None] - g64[None], axis=2)
    np.testing.assert_allclose(euclidean, wanted, rtol=1e-6)


def test_euclidean_distance_of_near_points_does_not_cancel():
    base = np.full((1, 64), 100.0, dtype=np.float32)
    near = base + np.float32(2**-10) * np.arange(64, dtype=np.float32)
    wanted = np.linalg.norm(near.astype(np.float64) - base)
    assert pairwise_distances(base, near, "euclidean").item() == pytest.approx(wanted, rel=1e-4)
    assert pairwise_distances(base, base, "euclidean").item() == 0.0


def test_a_zero_embedding_is_at_distance_one():
    assert pairwise_distances(np.zeros((1, 4)), np.ones((1, 4))).item() == 1.0


def test_distance_blocks_cover_all_rows():
    generator = torch.Generator().manual_seed(0)
    q, g = torch.rand(10, 4, generator=generator), torch.rand(6, 4, generator=generator)
    blocks = list(distance_blocks(q, g, block_bytes=3 * 6 * 4))
    assert [start for start, _ in blocks] == [0, 3, 6, 9]
    joined = torch.cat([block for _, block in blocks])
    assert torch.allclose(joined, pairwise_distances(q, g), atol=1e-6)
    assert pairwise_distances(q[:0], g).shape == (0, 6)
    assert pairwise_distances(q, g[:0]).shape == (10, 0)


def test_wrong_embeddings_are_named():
    with pytest.raises(ValueError, match=r"query \(3, 2\) and gallery \(4, 5\)"):
        pairwise_distances(np.zeros((3, 2)), np.zeros((4, 5)))
    with pytest.raises(ValueError, match="metric is 'dot'"):
        pairwise_distances(np.zeros((3, 2)), np.zeros((3, 2)), "dot")
    with pytest.raises(TypeError, match="query is list"):
        pairwise_distances([[1.0]], np.zeros((3, 1)))
