from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scalar_ranking import score_query

import gsalign.evaluation.ranking as ranking
from gsalign.errors import ConfigError, DataError
from gsalign.evaluation import rank, ranking_report

FIELDS = ("num_positives", "first_rank", "average_precision", "inp")


def problem(seed, queries, gallery, identities, cameras, values, dtype=np.float32):
    """A random problem whose distances take ``values`` different values, so that many tie."""
    random = np.random.default_rng(seed)
    return (
        (random.integers(0, values, (queries, gallery)) / 8.0).astype(dtype),
        random.integers(0, identities, queries),
        random.integers(0, identities, gallery),
        random.integers(0, cameras, queries),
        random.integers(0, cameras, gallery),
    )


def assert_same(one, other):
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field), err_msg=field)


def assert_like_scalar_code(result, distances, qi, gi, qc, gc):
    for q in range(len(distances)):
        positives, first, ap, inp = score_query(
            distances[q].tolist(), qi[q], qc[q], gi.tolist(), gc.tolist()
        )
        assert result.num_positives[q] == positives
        assert result.first_rank[q] == first
        if positives:
            assert result.average_precision[q] == pytest.approx(ap, rel=1e-14)
            assert result.inp[q] == pytest.approx(inp, rel=1e-14)
        else:
            assert np.isnan(result.average_precision[q])
            assert np.isnan(result.inp[q])


# A query of person 1 in camera 1. By distance: the image at 0.0 is of the same person and camera
# and left out; then other, self, other, self: positives at ranks 2 and 4.
HAND = (
    np.array([[0.4, 0.0, 0.1, 0.2, 0.3]], dtype=np.float32),
    np.array([1]),
    np.array([1, 1, 2, 1, 3]),
    np.array([1]),
    np.array([2, 1, 1, 3, 1]),
)


@pytest.mark.parametrize("ranker", ["numpy", "cpp", "torch"])
def test_a_query_computed_by_hand(compiled, ranker):
    result = rank(*HAND, ranker=ranker)
    assert result.num_positives.tolist() == [2]
    assert result.first_rank.tolist() == [2]
    assert result.average_precision.tolist() == [(1 / 2 + 2 / 4) / 2]
    assert result.inp.tolist() == [2 / 4]


@pytest.mark.parametrize("ranker", ["numpy", "cpp", "torch"])
def test_equal_distances_rank_in_gallery_order(compiled, ranker):
    same = np.zeros((2, 4), dtype=np.float64)
    qi, qc = np.array([1, 2]), np.array([0, 0])
    gi, gc = np.array([2, 1, 2, 1]), np.array([1, 1, 1, 1])
    result = rank(same, qi, gi, qc, gc, ranker=ranker)
    assert result.first_rank.tolist() == [2, 1]
    assert result.average_precision.tolist() == [(1 / 2 + 2 / 4) / 2, (1 / 1 + 2 / 3) / 2]
    assert result.inp.tolist() == [2 / 4, 2 / 3]


@pytest.mark.parametrize("ranker", ["numpy", "cpp", "torch"])
def test_minus_zero_equals_zero_and_infinity_is_last(compiled, ranker):
    distances = np.array([[0.0, -0.0, np.inf, -np.inf]])
    gi, gc = np.array([7, 1, 1, 8]), np.array([1, 1, 1, 1])
    result = rank(distances, np.array([1]), gi, np.array([0]), gc, ranker=ranker)
    assert result.first_rank.tolist() == [3]
    assert result.average_precision.tolist() == [(1 / 3 + 2 / 4) / 2]


@pytest.mark.parametrize("ranker", ["numpy", "cpp", "torch"])
def test_a_query_without_positives_has_no_scores(compiled, ranker):
    # Person 1 is in the gallery in the query's camera only, person 9 not at all.
    distances = np.array([[0.1, 0.2], [0.1, 0.2], [0.1, 0.2]])
    result = rank(
        distances, np.array([1, 9, 2]), np.array([1, 2]), np.array([5, 5, 5]), np.array([5, 6]),
        ranker=ranker,
    )  # fmt: skip
    assert result.num_positives.tolist() == [0, 0, 1]
    assert result.first_rank.tolist() == [0, 0, 2]
    assert np.isnan(result.average_precision).tolist() == [True, True, False]
    assert np.isnan(result.inp).tolist() == [True, True, False]


@settings(
    deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 10_000),
    queries=st.integers(0, 6),
    gallery=st.integers(0, 40),
    identities=st.integers(1, 6),
    cameras=st.integers(1, 3),
    values=st.sampled_from([1, 3, 20, 1000]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_all_rankers_agree_with_scalar_code(
    compiled, seed, queries, gallery, identities, cameras, values, dtype
):
    arguments = problem(seed, queries, gallery, identities, cameras, values, dtype)
    fast = rank(*arguments, ranker="cpp", threads=2)
    assert_same(fast, rank(*arguments, ranker="numpy"))
    assert_same(fast, rank(*arguments, ranker="torch"))
    assert_like_scalar_code(fast, *arguments)


@pytest.mark.parametrize("values", [4, 100_000])
@pytest.mark.parametrize("identities", [1, 2, 40])
def test_rankers_agree_with_few_and_with_many_positives(compiled, identities, values):
    # 1500 gallery images of 1 identity have more positives than are counted one by one.
    arguments = problem(3, 20, 1500, identities, 4, values)
    fast = rank(*arguments, ranker="cpp")
    assert_same(fast, rank(*arguments, ranker="numpy"))
    assert_same(fast, rank(*arguments, ranker="torch"))
    assert fast.num_positives.min() > (190 if identities <= 2 else 0)


@pytest.mark.parametrize("ranker", ["numpy", "cpp", "torch", "auto"])
def test_distances_may_be_a_tensor(compiled, ranker):
    distances, *labels = problem(8, 10, 30, 4, 2, 7)
    wanted = rank(distances, *labels, ranker="numpy")
    for tensor in (torch.from_numpy(distances), torch.from_numpy(distances).half()):
        assert_same(rank(tensor, *labels, ranker=ranker), wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_tensor_on_a_gpu_is_ranked_there(compiled, monkeypatch):
    distances, *labels = problem(9, 50, 3000, 40, 4, 300)
    wanted = rank(distances, *labels, ranker="cpp")
    monkeypatch.setattr(ranking, "_compiled", None)
    monkeypatch.setattr(ranking, "_rank_numpy", None)
    assert_same(rank(torch.from_numpy(distances).cuda(), *labels), wanted)


def test_the_number_of_threads_changes_nothing(compiled):
    arguments = problem(5, 64, 700, 12, 3, 9)
    one = rank(*arguments, ranker="cpp", threads=1)
    for threads in (2, 5, 100):
        assert_same(one, rank(*arguments, ranker="cpp", threads=threads))


@pytest.mark.parametrize("ranker", ["numpy", "cpp", "torch"])
def test_any_stride_and_type_of_distances(compiled, ranker):
    distances, *labels = problem(6, 10, 30, 4, 2, 7)
    wanted = rank(distances, *labels, ranker=ranker)
    wide = np.full((20, 60), np.nan, dtype=np.float32)
    wide[::2, ::2] = distances
    assert_same(rank(wide[::2, ::2], *labels, ranker=ranker), wanted)
    wide[::2, :30] = distances
    assert_same(rank(wide[::2, :30], *labels, ranker=ranker), wanted)
    assert_same(rank(np.asfortranarray(distances), *labels, ranker=ranker), wanted)
    assert_same(rank(distances.astype(np.float16), *labels, ranker=ranker), wanted)
    assert_same(rank((distances * 8).astype(np.int32), *labels, ranker=ranker), wanted)
    backwards = distances[::-1]
    flipped = [labels[0][::-1], labels[1], labels[2][::-1], labels[3]]
    result = rank(backwards, *flipped, ranker=ranker)
    np.testing.assert_array_equal(result.first_rank, wanted.first_rank[::-1])


@pytest.mark.parametrize("ranker", ["numpy", "cpp", "torch"])
def test_nan_is_rejected_with_its_place(compiled, ranker):
    distances, *labels = problem(7, 10, 30, 4, 2, 7)
    distances[4, 9] = distances[4, 20] = distances[6, 1] = np.nan
    with pytest.raises(DataError, match=r"distances\[4, 9\] is NaN.*not finite"):
        rank(distances, *labels, ranker=ranker)


@pytest.mark.parametrize(
    ("place", "name"),
    [(1, "query_identities"), (2, "gallery_identities"), (3, "query_cameras"),
     (4, "gallery_cameras")],
)  # fmt: skip
def test_columns_of_the_wrong_length_are_named(place, name):
    arguments = list(HAND)
    arguments[place] = np.zeros(7, dtype=np.int64)
    with pytest.raises(ValueError, match=rf"{name} has shape \(7,\)"):
        rank(*arguments)


def test_other_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="wanted \\[Q, G\\]"):
        rank(HAND[0][0], *HAND[1:])
    with pytest.raises(ConfigError, match="ranker is 'fast'"):
        rank(*HAND, ranker="fast")


def test_without_the_compiled_ranker_numpy_serves_and_the_report_says_why(monkeypatch):
    monkeypatch.setattr(ranking, "_compiled", None)
    monkeypatch.setattr(ranking, "_why_not", "it was not built")
    assert ranking_report() == {"cpp": "it was not built", "numpy": "", "torch": ""}
    assert_same(rank(*HAND), rank(*HAND, ranker="numpy"))
    with pytest.raises(ConfigError, match="'cpp' cannot run: it was not built"):
        rank(*HAND, ranker="cpp")


def test_the_reason_of_a_failed_import(monkeypatch):
    def fail(name):
        raise ImportError("no such thing")

    monkeypatch.setattr(ranking.importlib, "import_module", fail)
    module, reason = ranking._load_compiled()
    assert module is None
    assert "not built or does not load: no such thing" in reason
    monkeypatch.setattr(ranking.importlib, "import_module", lambda name: object())
    assert "without the ranker" in ranking._load_compiled()[1]


def test_auto_takes_the_compiled_ranker(compiled, monkeypatch):
    calls = []

    class Spy:
        @staticmethod
        def rank(*arguments, **options):
            calls.append(options)
            return compiled.rank(*arguments, **options)

    monkeypatch.setattr(ranking, "_compiled", Spy)
    rank(*HAND, threads=3)
    assert calls == [{"threads": 3}]


def test_the_module_itself_checks_its_arguments(bindings):
    distances, qi, gi, qc, gc = HAND
    with pytest.raises(ValueError, match=r"gallery_cameras must have shape \[5\], got \(1,\)"):
        bindings.rank(distances, qi, gi, qc, qc)
    with pytest.raises(ValueError, match="rows of distances must be contiguous"):
        bindings.rank(np.zeros((1, 10), np.float32)[:, ::2], qi, gi, qc, gc)
    with pytest.raises(ValueError, match="NaN"):
        bindings.rank(np.full((1, 5), np.nan), qi, gi, qc, gc)
    with pytest.raises(TypeError):
        bindings.rank(np.zeros((1, 5), np.int32), qi, gi, qc, gc)
    with pytest.raises(ValueError, match=r"shape \[Q, G\]"):
        bindings.rank(np.zeros(5, np.float32), qi, gi, qc, gc)


def test_the_build_report_names_the_compiler(bindings):
    report = bindings.build_report()
    assert report["compiler"]
    assert all(isinstance(key, str) for key in report)
