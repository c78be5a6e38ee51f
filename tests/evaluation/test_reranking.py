"""Re-ranking and query expansion against dense forms written from the definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dense_reranking import rerank_dense

import gsalign.evaluation.reranking as reranking
import gsalign.evaluation.sparse_rows as sparse_rows
from gsalign.evaluation import (
    Expansion,
    Reranking,
    expand_embeddings,
    pairwise_distances,
    rerank,
    rerank_blocks,
)


def people(queries, gallery, width=24, identities=20, noise=0.8, seed=0, dtype=np.float64):
    random = np.random.default_rng(seed)
    centres = random.standard_normal((identities, width))
    return tuple(
        (centres[random.integers(0, identities, count)]
         + noise * random.standard_normal((count, width))).astype(dtype)
        for count in (queries, gallery)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("k1", "k2", "weight"), [(20, 6, 0.3), (5, 1, 0.0), (7, 3, 0.5), (3, 8, 0.3), (20, 6, 1.0)]
)
def test_the_dense_form_gives_the_same(k1, k2, weight):
    query, gallery = people(25, 120)
    wanted = rerank_dense(query, gallery, k1, k2, weight)
    found = rerank(query, gallery, Reranking(k1, k2, weight))
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=1e-10)


def test_single_precision_ranks_as_the_dense_form_in_double():
    query, gallery = people(25, 160, noise=1.2, dtype=np.float32)
    wanted = rerank_dense(query.astype(np.float64), gallery.astype(np.float64), 20, 6, 0.3)
    found = rerank(query, gallery).numpy()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)
    for row, exact in zip(found, wanted, strict=True):
        # The same order, but for pairs that the dense form has closer than float32 can tell.
        ordered = exact[np.argsort(row, kind="stable")]
        assert (np.maximum.accumulate(ordered) - ordered).max() < 4e-6


def test_re_ranking_helps_and_weight_one_changes_no_rank():
    query, gallery = people(25, 120)
    plain = pairwise_distances(query, gallery).numpy()
    kept = rerank(query, gallery, Reranking(weight=1.0)).numpy()
    np.testing.assert_array_equal(np.argsort(kept, 1), np.argsort(plain, 1))
    assert (np.argsort(rerank(query, gallery).numpy(), 1) != np.argsort(plain, 1)).any()


def test_the_size_of_tiles_and_the_number_of_threads_change_nothing(monkeypatch):
    query, gallery = people(30, 100, dtype=np.float32)
    whole = rerank(query, gallery)
    monkeypatch.setattr(sparse_rows, "_PAIRS_AT_A_TIME", 900)
    monkeypatch.setattr(reranking, "_SETS_AT_A_TIME", 37)
    assert torch.equal(rerank(query, gallery), whole)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert torch.equal(rerank(query, gallery), whole)
    torch.set_num_threads(threads)
    blocks = list(rerank_blocks(query, gallery, block_bytes=8 * 4 * 100 * 14))
    assert [start for start, _ in blocks] == list(range(0, 30, 14))
    np.testing.assert_allclose(torch.cat([b for _, b in blocks]), whole, rtol=0, atol=1e-6)


def test_the_memory_does_not_grow_with_queries_times_gallery():
    # Nothing larger than a few times k1 squared per image, though 600 x 600 would be.
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.untyped_storage().nbytes())
            return result

    query, gallery = people(300, 300, dtype=np.float32)
    with Watch(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_rows, "_PAIRS_AT_A_TIME", 2500)
        patch.setattr(reranking, "_SETS_AT_A_TIME", 64)
        for _ in rerank_blocks(query, gallery, Reranking(k1=6, k2=3), block_bytes=100_000):
            pass
    assert largest < 600 * 600 * 4 / 2


def test_the_euclidean_distance_is_squared():
    query, gallery = (torch.from_numpy(part) for part in people(10, 60))
    query, gallery = (torch.nn.functional.normalize(part, dim=1) for part in (query, gallery))
    np.testing.assert_allclose(
        rerank(query, gallery, metric="euclidean"), rerank(query, gallery), rtol=0, atol=1e-9
    )


def test_parts_are_re_ranked_too():
    query, gallery = people(8, 40)
    ones = torch.ones(8, 1), torch.ones(40, 1)
    found = rerank(query[:, None], gallery[:, None], visibility=ones)
    np.testing.assert_allclose(found, rerank(query, gallery), rtol=0, atol=1e-6)


def test_copies_of_one_image_and_galleries_smaller_than_k1():
    same = np.ones((30, 4))
    found = rerank(same[:10], same[10:])
    assert found.isfinite().all() and found.min() >= 0
    query, gallery = people(1, 3)
    np.testing.assert_allclose(
        rerank(query, gallery), rerank_dense(query, gallery, 20, 6, 0.3), atol=1e-10
    )
    assert rerank(np.zeros((0, 4)), same).shape == (0, 30)


def test_wrong_settings_are_named():
    for settings, message in (
        ({"k1": 0}, "k1 of the re-ranking is 0"),
        ({"k2": 0}, "k2 of the re-ranking is 0"),
        ({"weight": 1.5}, r"weight of the re-ranking is 1\.5"),
    ):
        with pytest.raises(ValueError, match=message):
            Reranking(**settings)
    for settings, message in (({"k": 0}, "k of the query exp"), ({"alpha": -1}, "alpha of the")):
        with pytest.raises(ValueError, match=message):
            Expansion(**settings)


def expand_dense(query, gallery, k, alpha):
    points = np.concatenate([query, gallery])
    points = points / np.linalg.norm(points, axis=1, keepdims=True)
    similarity = points @ points.T
    result = []
    for row in similarity:
        near = np.argsort(-row, kind="stable")[:k]
        result.append((np.maximum(row[near], 0)[:, None] ** alpha * points[near]).sum(axis=0))
    result = np.array(result)
    result /= np.linalg.norm(result, axis=1, keepdims=True)
    return result[: len(query)], result[len(query) :]


@pytest.mark.parametrize(("k", "alpha"), [(5, 3.0), (1, 3.0), (4, 0.0), (500, 1.0)])
def test_query_expansion(k, alpha):
    query, gallery = people(12, 50)
    found = expand_embeddings(query, gallery, Expansion(k, alpha), block_bytes=3000)
    for part, wanted in zip(found, expand_dense(query, gallery, k, alpha), strict=True):
        np.testing.assert_allclose(part.numpy(), wanted, rtol=0, atol=1e-12)


def test_query_expansion_wants_one_embedding_an_image():
    with pytest.raises(ValueError, match="one embedding an image"):
        expand_embeddings(np.zeros((2, 3, 4)), np.zeros((2, 3, 4)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same():
    query, gallery = (torch.from_numpy(part) for part in people(30, 100))
    found = rerank(query.cuda(), gallery.cuda())
    assert found.is_cuda
    np.testing.assert_allclose(found.cpu(), rerank(query, gallery), rtol=0, atol=1e-10)
