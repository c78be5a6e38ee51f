"""ROC, thresholds and error rates against counts pair by pair."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gsalign.data import AERIAL, GROUND
from gsalign.errors import ConfigError, DataError
from gsalign.evaluation import (
    Expansion,
    Features,
    Reranking,
    Search,
    calibrate_threshold,
    compare,
    error_rates,
    evaluate_features,
    expand_embeddings,
    pairwise_distances,
    rerank,
    verify,
)


def features(count, seed, identities=9, lists=None, parts=0):
    random = np.random.default_rng(seed)
    people = random.integers(0, identities, count)
    centres = np.random.default_rng(77).standard_normal((identities, 8))
    embeddings = centres[people] + random.standard_normal((count, 8))
    embeddings = torch.nn.functional.normalize(torch.from_numpy(embeddings).float(), dim=1)
    return Features(
        embeddings=embeddings if not parts else embeddings[:, None].repeat(1, parts, 1),
        identities=people,
        cameras=random.integers(0, 4, count),
        views=random.integers(0, 2, count),
        indices=np.arange(count),
        paths=tuple(f"{i}.jpg" for i in range(count)),
        visibility=torch.ones(count, parts) if parts else None,
        lists=lists or {},
    )


QUERY, GALLERY = features(40, 1), features(90, 2)


def pairs(name):
    """Distances of the positive and of the negative pairs of a protocol, one by one."""
    distances = pairwise_distances(QUERY.embeddings, GALLERY.embeddings)
    positive, negative = [], []
    for i in range(len(QUERY)):
        for j in range(len(GALLERY)):
            if name == "aerial-to-ground" and not (
                QUERY.views[i] == AERIAL and GALLERY.views[j] == GROUND
            ):
                continue
            column = "views" if name == "aerial-ground-vdt" else "cameras"
            if QUERY.identities[i] != GALLERY.identities[j]:
                negative.append(float(distances[i, j]))
            elif getattr(QUERY, column)[i] != getattr(GALLERY, column)[j]:
                positive.append(float(distances[i, j]))
    return np.array(positive), np.array(negative)


@pytest.mark.parametrize("name", ["all", "aerial-to-ground", "aerial-ground-vdt"])
def test_the_roc_counts_every_pair(name):
    positive, negative = pairs(name)
    found = verify(compare(QUERY, GALLERY, name))
    # Blocks differ from the whole product in the last bit.
    np.testing.assert_allclose(found.distances, np.sort(positive), rtol=0, atol=1e-6)
    assert found.negatives == len(negative)
    counts = [(negative <= limit).sum() for limit in found.distances]
    np.testing.assert_array_equal(found.false_positives, counts)
    false, true = found.curve()
    np.testing.assert_allclose(false, np.array(counts) / len(negative))
    assert true[0] == 1 / len(positive) and true[-1] == 1.0
    for rate in (0.5, 1e-1, 1e-2):
        allowed = np.sort(negative)[int(rate * len(negative))]
        # The best threshold lies just below the first negative pair too many.
        assert found.true_positive_rate(rate) == (positive < allowed).mean()
        threshold = found.threshold(rate)
        rates = error_rates(compare(QUERY, GALLERY, name), threshold)
        assert rates.false_accept <= rate
        assert rates.false_reject == pytest.approx(1 - found.true_positive_rate(rate))
        assert (rates.positives, rates.negatives) == (len(positive), len(negative))


def test_pairs_as_near_as_each_other():
    # Two of one person and two of two people at the same distance: all or none are accepted.
    query = features(1, 3)
    gallery = features(4, 3)
    same = torch.ones(4, 8)
    people = np.array([0, 0, 1, 1])
    query = Features(same[:1], people[:1], np.array([9]), np.array([0]), np.array([0]), ("q",))
    gallery = Features(same, people, np.zeros(4, int), np.zeros(4, int), np.arange(4), ("g",) * 4)
    found = verify(compare(query, gallery, "all"))
    assert found.false_positives.tolist() == [2, 2]
    assert found.true_positive_rate(0.99) == 0.0 and found.true_positive_rate(1.0) == 1.0
    with pytest.raises(DataError, match=r"false positive rate of 0\.5 or less"):
        found.threshold(0.5)
    with pytest.raises(DataError, match=r"is 2; it must be in 0\.\.1"):
        found.threshold(2)


def test_rates_finer_than_a_pair_are_not_given():
    summary = verify(compare(QUERY, GALLERY, "all")).as_dict()
    assert 0 < summary["TPR@FPR=1e-02"] <= summary["TPR@FPR=1e-01"] <= 100
    assert summary["TPR@FPR=1e-04"] is None  # of about 3200 negative pairs
    assert summary["positives"] + summary["negatives"] < 40 * 90


def test_a_protocol_without_pairs():
    nobody = features(3, 4).take(np.array([], dtype=np.int64))
    comparison = compare(nobody, GALLERY, "all")
    found = verify(comparison)
    assert np.isnan(found.true_positive_rate(0.1))
    assert set(found.as_dict().values()) == {None, 0}
    with pytest.raises(DataError, match="compares 0 pairs of one person and 0 of two"):
        found.threshold(0.1)
    rates = error_rates(comparison, 0.5)
    assert np.isnan(rates.false_accept) and np.isnan(rates.false_reject)
    assert rates.as_dict()["false_accept"] is None
    assert comparison.evaluate().num_queries == 0


def test_a_threshold_is_calibrated_on_one_set_and_tried_on_another():
    validation = compare(features(60, 5), features(90, 6), "all")
    tests = [compare(QUERY, GALLERY, name) for name in ("all", "aerial-to-ground")]
    found = calibrate_threshold(validation, tests, 0.05)
    assert found.calibration.threshold == verify(validation).threshold(0.05)
    assert found.calibration.false_accept <= 0.05
    document = found.as_dict()
    assert document["target_false_accept"] == 5.0
    assert document["distance"] == found.calibration.threshold
    assert list(document["test"]) == ["all", "aerial-to-ground"]
    for test in tests:
        assert found.test[test.protocol.name] == error_rates(test, found.calibration.threshold)


def test_a_threshold_that_means_nothing_is_refused():
    validation = compare(features(60, 5), features(90, 6), "all")
    with pytest.raises(DataError, match=r"of 1e-05 cannot be calibrated on [\d,]+ pairs"):
        calibrate_threshold(validation, [], 1e-5)
    for search in (Search(expansion=Expansion()), Search(reranking=Reranking())):
        with pytest.raises(DataError, match="one of plain distances"):
            calibrate_threshold(validation, [compare(QUERY, GALLERY, "all", search)], 0.05)


@pytest.mark.parametrize(
    "search",
    [
        Search(),
        Search(metric="euclidean"),
        Search(expansion=Expansion(k=3)),
        Search(reranking=Reranking(k1=8, k2=3)),
        Search(expansion=Expansion(), reranking=Reranking(k1=8, k2=3)),
    ],
)
def test_a_comparison_evaluates_what_the_search_says(search):
    name = "aerial-to-ground"
    query = QUERY.take(np.flatnonzero(QUERY.views == AERIAL))
    gallery = GALLERY.take(np.flatnonzero(GALLERY.views == GROUND))
    q, g = query.embeddings, gallery.embeddings
    if search.expansion is not None:
        q, g = expand_embeddings(q, g, search.expansion)
    if search.reranking is not None:
        wanted = rerank(q, g, search.reranking)
    else:
        wanted = pairwise_distances(q, g, search.metric)
    comparison = compare(QUERY, GALLERY, name, search)
    np.testing.assert_array_equal(comparison.rows, query.indices)
    np.testing.assert_array_equal(comparison.columns, gallery.indices)
    for _ in range(2):
        distances = torch.cat([block for _, block in comparison.blocks()])
        np.testing.assert_allclose(distances, wanted, rtol=0, atol=1e-6)
    found = evaluate_features(QUERY, GALLERY, protocols=[name], search=search)[name]
    again = comparison.evaluate()
    np.testing.assert_array_equal(found.average_precision, again.average_precision)
    np.testing.assert_array_equal(found.query_indices, query.indices)


def test_a_large_re_ranking_is_made_again_instead_of_kept(monkeypatch):
    search = Search(reranking=Reranking(k1=8))
    kept = compare(QUERY, GALLERY, "all", search)
    monkeypatch.setattr("gsalign.evaluation.comparison._KEPT_BYTES", 0)
    made = compare(QUERY, GALLERY, "all", search)
    for (_, one), (_, other) in zip(kept.blocks(), made.blocks(), strict=True):
        assert torch.equal(one, other)
    assert "_kept_blocks" not in made.__dict__


def test_a_protocol_with_a_list_takes_what_it_names():
    random = np.random.default_rng(0)
    on = {"aerial-to-cctv": random.random(40) < 0.7}, {"aerial-to-cctv": random.random(90) < 0.7}
    query, gallery = features(40, 1, lists=on[0]), features(90, 2, lists=on[1])
    wanted = [
        np.flatnonzero((part.views == view) & listed["aerial-to-cctv"])
        for part, view, listed in ((query, AERIAL, on[0]), (gallery, GROUND, on[1]))
    ]
    result = evaluate_features(query, gallery, protocols=["aerial-to-cctv"])["aerial-to-cctv"]
    np.testing.assert_array_equal(result.query_indices, wanted[0])
    assert result.num_gallery == len(wanted[1])
    comparison = compare(query, gallery, "aerial-to-cctv")
    np.testing.assert_array_equal(comparison.columns, wanted[1])
    np.testing.assert_array_equal(comparison.evaluate().first_rank, result.first_rank)
    for call in (compare, lambda *a: evaluate_features(*a[:2], protocols=[a[2]])):
        with pytest.raises(ConfigError, match="needs the list of its images"):
            call(QUERY, GALLERY, "aerial-to-cctv")


def test_expansion_of_parts_is_refused_and_re_ranking_is_not():
    query, gallery = features(10, 1, parts=2), features(30, 2, parts=2)
    with pytest.raises(ConfigError, match="leave the expansion out"):
        compare(query, gallery, "all", Search(expansion=Expansion()))
    result = compare(query, gallery, "all", Search(reranking=Reranking(k1=5))).evaluate()
    plain = features(10, 1), features(30, 2)
    wanted = compare(*plain, "all", Search(reranking=Reranking(k1=5))).evaluate()
    np.testing.assert_allclose(result.average_precision, wanted.average_precision)
