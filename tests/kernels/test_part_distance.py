"""Part distances and search by them: every implementation that can run here, and scalar code."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import torch
from support import (
    assert_close_to_reference,
    bitwise_equal,
    device_of,
    fused,
    in_float64,
    poisoned_memory,
    random,
    strided,
    threads,
)
from torch import Tensor

import gsalign_kernels as kernels
from gsalign_kernels.reference import distance as reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
METRICS = ("cosine", "euclidean")
ALL = ["reference", *fused("part_distance")]
SCALAR = ["reference", *(p for p in fused("part_distance") if p.values[0] == "cpp")]

# (Q, G, P, D): within a tile, a vector and a tile more or less, many blocks, one part, one channel.
SIZES = (
    (3, 5, 2, 7),
    (16, 12, 6, 16),
    (17, 13, 3, 33),
    (33, 300, 4, 20),
    (1, 40, 1, 1),
    (600, 2, 2, 3),
    (70, 25, 6, 300),
)


def inputs(queries, gallery, parts, channels, *, dtype=torch.float32, seed=0, device="cpu"):
    """Embeddings, and visibilities of which a third is 0 and a third is 1."""
    embeddings = [
        random(count, parts, channels, seed=seed + i, dtype=dtype)
        for i, count in enumerate((queries, gallery))
    ]
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    visibilities = []
    for i, count in enumerate((queries, gallery)):
        generator = torch.Generator().manual_seed(seed + 2 + i)
        drawn = torch.rand(count, parts, generator=generator, dtype=torch.float64)
        visibilities.append((3.0 * drawn - 1.0).clamp(0.0, 1.0).to(kind))
    return tuple(t.to(device) for t in (*embeddings, *visibilities))


def in_reference(arguments, **options):
    exact = (in_float64(t, grad=False) for t in arguments)
    return kernels.part_distance(*exact, implementation="reference", **options)


def assert_distances(actual: Tensor, expected: Tensor, dtype: torch.dtype, slack: float = 1.0):
    """The same places unmatched, and the others alike."""
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    actual = actual.cpu()
    assert actual.dtype == kind and actual.shape == expected.shape
    assert torch.equal(actual.isinf(), expected.isinf())
    assert_close_to_reference(
        actual.masked_fill(actual.isinf(), 0.0),
        expected.masked_fill(expected.isinf(), 0.0),
        kind,
        slack=slack,
    )


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_agrees_with_the_reference(implementation, metric, dtype, size):
    arguments = inputs(*size, dtype=dtype, device=device_of(implementation))
    with poisoned_memory():
        actual = kernels.part_distance(*arguments, metric=metric, implementation=implementation)
    expected = in_reference(arguments, metric=metric)
    assert_distances(actual, expected, dtype)


def scalar_distance(metric, query, gallery, query_visibility, gallery_visibility):
    """The documented formula in Python's own arithmetic; None without a common part."""
    total, weights = [], []
    for q, g, v, u in zip(query, gallery, query_visibility, gallery_visibility, strict=True):
        w = math.sqrt(v * u)
        if w == 0.0:
            continue
        if metric == "euclidean":
            d = math.dist(q, g)
        else:
            lengths = math.hypot(*q) * math.hypot(*g)
            product = math.fsum(a * b for a, b in zip(q, g, strict=True))
            d = 1.0 - (product / lengths if lengths else 0.0)
        total.append(w * d)
        weights.append(w)
    return math.fsum(total) / math.fsum(weights) if weights else None


def scalar_matrix(arguments, metric, unmatched):
    query, gallery, query_visibility, gallery_visibility = (t.tolist() for t in arguments)
    return [
        [
            unmatched if (d := scalar_distance(metric, q, g, v, u)) is None else d
            for g, u in zip(gallery, gallery_visibility, strict=True)
        ]
        for q, v in zip(query, query_visibility, strict=True)
    ]


@pytest.mark.parametrize("implementation", SCALAR)
@pytest.mark.parametrize("metric", METRICS)
def test_agrees_with_scalar_arithmetic(implementation, metric):
    arguments = inputs(7, 14, 3, 5, dtype=torch.float64)
    arguments[0][2, 1] = 0.0
    arguments[3][3] = 4.0
    actual = kernels.part_distance(
        *arguments, metric=metric, unmatched=-7.5, implementation=implementation
    )
    expected = torch.tensor(scalar_matrix(arguments, metric, -7.5), dtype=torch.float64)
    assert (expected == -7.5).any() and (expected != -7.5).any()
    assert_close_to_reference(actual, expected, torch.float64)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("metric", METRICS)
def test_binary_visibilities_give_the_mean_over_common_parts(implementation, metric):
    query, gallery, *_ = inputs(9, 20, 4, 6, device=device_of(implementation))
    seen = [random(n, 4, seed=5 + n).to(query.device) > 0.0 for n in (9, 20)]
    actual = kernels.part_distance(
        query, gallery, *seen, metric=metric, implementation=implementation
    )
    # The public practice: a tensor of parts x queries x gallery, then a mean under a mask.
    q, g = (t.double().transpose(0, 1) for t in (query, gallery))
    if metric == "cosine":
        each = 1.0 - torch.nn.functional.cosine_similarity(q.unsqueeze(2), g.unsqueeze(1), dim=3)
    else:
        each = (q.unsqueeze(2) - g.unsqueeze(1)).norm(dim=3)
    common = seen[0].T.unsqueeze(2) & seen[1].T.unsqueeze(1)
    count = common.sum(dim=0)
    expected = (each * common).sum(dim=0) / count
    assert bool((count == 0).any())
    assert_distances(actual, expected.masked_fill(count == 0, math.inf).cpu(), torch.float32)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "size", [(0, 5, 2, 3), (5, 0, 2, 3), (0, 0, 0, 0), (4, 5, 0, 3), (4, 5, 2, 0)]
)
def test_nothing_on_a_side(implementation, metric, size):
    queries, gallery, parts, _ = size
    query, images, *_ = inputs(*size, device=device_of(implementation))
    seen = [torch.ones(n, parts, device=query.device) for n in (queries, gallery)]
    with poisoned_memory():
        distances = kernels.part_distance(
            query, images, *seen, metric=metric, implementation=implementation
        )
        nearest, indices = kernels.part_search(
            query, images, *seen, k=min(2, gallery), metric=metric, implementation=implementation
        )
    # No parts: nothing in common. No channels: all vectors are zero.
    wanted = math.inf if parts == 0 else float(metric == "cosine")
    assert distances.shape == (queries, gallery) and bool((distances == wanted).all())
    assert nearest.shape == indices.shape == (queries, min(2, gallery))
    assert bool((nearest == wanted).all())
    assert indices.tolist() == [list(range(min(2, gallery)))] * queries


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_only_a_common_part_that_is_not_finite_spoils_a_distance(implementation, metric, poison):
    query, gallery, *_ = inputs(20, 30, 3, 8, device=device_of(implementation))
    generator = torch.Generator().manual_seed(3)
    seen = [
        torch.randint(2, (n, 3), generator=generator).float().to(query.device) for n in (20, 30)
    ]
    seen[0][2, 0] = seen[1][7, 1] = 1.0
    clean = kernels.part_distance(
        query, gallery, *seen, metric=metric, implementation=implementation
    )
    query[2, 0, 3] = gallery[7, 1, 0] = poison
    actual = kernels.part_distance(
        query, gallery, *seen, metric=metric, implementation=implementation
    )
    spoiled = torch.zeros_like(clean, dtype=torch.bool)
    spoiled[2] |= seen[1][:, 0] > 0
    spoiled[:, 7] |= seen[0][:, 1] > 0
    assert spoiled.any() and not spoiled[2].all() and not spoiled[:, 7].all()
    assert torch.equal(actual.isnan(), spoiled)
    assert bitwise_equal(actual[~spoiled], clean[~spoiled])


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("visibility", [-1.0, math.nan, math.inf])
def test_what_is_no_visibility_makes_the_distances_of_its_image_nan(
    implementation, metric, visibility
):
    arguments = inputs(6, 14, 2, 4, device=device_of(implementation))
    arguments[2][3, 1] = arguments[3][9, 0] = visibility
    actual = kernels.part_distance(*arguments, metric=metric, implementation=implementation)
    spoiled = torch.zeros_like(actual, dtype=torch.bool)
    spoiled[3], spoiled[:, 9] = True, True
    assert torch.equal(actual.isnan(), spoiled)


@pytest.mark.parametrize("implementation", ALL)
def test_negative_zero_is_a_visibility_of_zero(implementation):
    query, gallery, *_ = inputs(2, 3, 2, 4, device=device_of(implementation))
    query[0, 0] = math.nan
    seen = torch.tensor([[-0.0, 1.0], [-0.0, -0.0]], device=query.device)
    actual = kernels.part_distance(
        query, gallery, seen, torch.ones(3, 2, device=query.device), implementation=implementation
    )
    assert bool(actual[0].isfinite().all()) and bool((actual[1] == math.inf).all())


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e25, 3e37])
def test_cosines_do_not_hang_on_the_length(implementation, scale):
    query, gallery, *seen = inputs(5, 14, 3, 6, device=device_of(implementation))
    scaled = (gallery.double() * scale).float()
    actual = kernels.part_distance(query, scaled, *seen, implementation=implementation)
    expected = in_reference((query, scaled, *seen))
    assert_distances(actual, expected, torch.float32)


@pytest.mark.parametrize("implementation", ALL)
def test_near_vectors_far_from_the_origin_keep_their_distance(implementation):
    """By squares and a product, in float32, none of these distances would have a digit left."""
    query = random(6, 2, 64, seed=0, dtype=torch.float32) + 100.0
    gallery = query[[0, 1, 2, 3, 4, 5, 0]] + 1e-3 * random(7, 2, 64, seed=1, dtype=torch.float32)
    gallery[6] = query[0]
    device = device_of(implementation)
    query, gallery = query.to(device), gallery.to(device)
    seen = torch.ones(6, 2, device=device), torch.ones(7, 2, device=device)
    options = {"metric": "euclidean", "implementation": implementation}
    actual = kernels.part_distance(query, gallery, *seen, **options)
    pairs = actual[torch.arange(6), torch.arange(6)]
    exact = (query.double() - gallery[:6].double()).norm(dim=2).mean(dim=1)
    assert_close_to_reference(pairs, exact.cpu(), torch.float32, slack=10.0)
    assert float(actual[0, 6]) < 1e-5


@pytest.mark.parametrize("implementation", ALL)
def test_a_cosine_distance_is_never_negative(implementation):
    query = random(40, 3, 50, seed=0, dtype=torch.float32).to(device_of(implementation))
    seen = torch.ones(40, 3, device=query.device)
    actual = kernels.part_distance(query, 3.0 * query, seen, seen, implementation=implementation)
    assert float(actual.min()) >= 0.0 and float(actual.diagonal().max()) < 1e-6


@pytest.mark.parametrize("implementation", fused("part_distance"))
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(implementation, metric, dtype):
    arguments = inputs(19, 29, 3, 10, dtype=dtype, device=device_of(implementation))
    expected = kernels.part_distance(*arguments, metric=metric, implementation=implementation)
    found = kernels.part_search(*arguments, k=5, metric=metric, implementation=implementation)
    views = [strided(t) for t in arguments]
    turned = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in arguments]
    shared = [arguments[0], arguments[1], *(v[:1].expand_as(v) for v in arguments[2:])]
    whole = [arguments[0], arguments[1], *(v.contiguous() for v in shared[2:])]
    for given in (views, turned):
        actual = kernels.part_distance(*given, metric=metric, implementation=implementation)
        assert bitwise_equal(actual, expected)
        again = kernels.part_search(*given, k=5, metric=metric, implementation=implementation)
        assert all(map(bitwise_equal, again, found))
    one, other = (
        kernels.part_distance(*given, metric=metric, implementation=implementation)
        for given in (shared, whole)
    )
    assert bitwise_equal(one, other)


@pytest.mark.parametrize("implementation", fused("part_distance"))
@pytest.mark.parametrize("metric", METRICS)
def test_a_distance_has_the_same_bits_wherever_its_images_stand(implementation, metric):
    query, gallery, seen, shown = inputs(75, 130, 3, 20, device=device_of(implementation))
    options = {"metric": metric, "implementation": implementation}
    whole = kernels.part_distance(query, gallery, seen, shown, **options)
    for rows, columns in (((0, 1), (0, 1)), ((5, 40), (3, 100)), ((74, 75), (7, 130))):
        q, g = slice(*rows), slice(*columns)
        part = kernels.part_distance(query[q], gallery[g], seen[q], shown[g], **options)
        assert bitwise_equal(part, whole[q, g])


@pytest.mark.parametrize("implementation", fused("part_distance"))
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("size", [(1100, 40, 2, 9), (5, 3000, 2, 9), (40, 200, 5, 200)])
def test_every_bit_is_the_same_for_any_threads(implementation, metric, size):
    arguments = inputs(*size, device=device_of(implementation))
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(
                (
                    kernels.part_distance(*arguments, metric=metric, implementation=implementation),
                    *kernels.part_search(
                        *arguments, k=7, metric=metric, implementation=implementation
                    ),
                )
            )
    for other in results[1:]:
        assert all(map(bitwise_equal, results[0], other))


def ordered(distances: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """By Python's own sort, which is stable; NaN behind everything."""

    def nan_last(value: float) -> tuple[bool, float]:
        return math.isnan(value), 0.0 if math.isnan(value) else value

    rows = distances.cpu().tolist()
    order = [sorted(range(len(row)), key=lambda i, row=row: nan_last(row[i]))[:k] for row in rows]
    indices = torch.tensor(order, dtype=torch.int64).reshape(len(rows), k)
    return distances.cpu().gather(1, indices), indices


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "k"),
    [((5, 40, 3, 8), 10), ((20, 700, 2, 5), 1), ((3, 30, 2, 4), 30), ((2, 9, 1, 3), 0)],
)
def test_search_is_the_head_of_a_stable_sort(implementation, metric, dtype, size, k):
    query, gallery, seen, shown = inputs(*size, dtype=dtype, device=device_of(implementation))
    # Equal images, unmatched ones and NaN, spread over the gallery.
    gallery[1::3], shown[1::3] = gallery[:1], shown[:1]
    shown[2::7] = 0.0
    gallery[5::11] = math.nan
    arguments = query, gallery, seen, shown
    distances = kernels.part_distance(*arguments, metric=metric, implementation=implementation)
    with poisoned_memory():
        found = kernels.part_search(*arguments, k=k, metric=metric, implementation=implementation)
    expected = ordered(distances, k)
    assert torch.equal(found[1].cpu(), expected[1])
    torch.testing.assert_close(found[0].cpu(), expected[0], rtol=0, atol=0, equal_nan=True)
    assert found[1].dtype == torch.int64 and found[0].dtype == distances.dtype


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_images_come_in_their_order_whatever_the_tiles(implementation, dtype):
    """Whole numbers, whose distances are exact: no tile can round one apart from another."""
    device = device_of(implementation)
    generator = torch.Generator().manual_seed(1)
    gallery = torch.randint(2, (150, 1, 4), generator=generator).to(device, dtype) * 4.0
    query = torch.zeros(3, 1, 4, dtype=dtype, device=device)
    query[1] = 4.0
    query[2, 0, 0] = 4.0
    seen = [torch.ones(n, 1, dtype=dtype, device=device) for n in (3, 150)]
    seen[1][::5] = 0.0
    options = {"k": 40, "metric": "euclidean", "implementation": implementation}
    distances = kernels.part_distance(
        query, gallery, *seen, metric="euclidean", implementation=implementation
    )
    expected = ordered(distances, 40)
    assert len(set(expected[0][0].tolist())) < 6
    for tile_bytes in (1, 100, 3 * dtype.itemsize * 37, 2**20):
        found = kernels.part_search(query, gallery, *seen, tile_bytes=tile_bytes, **options)
        assert torch.equal(found[1].cpu(), expected[1])
        assert bitwise_equal(found[0], expected[0])


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("tile_bytes", [1, 5 * 4 * 17, 2**20])
def test_tiles_cut_the_search_and_change_no_result(implementation, tile_bytes):
    arguments = inputs(5, 60, 3, 8, device=device_of(implementation))
    options = {"k": 12, "implementation": implementation}
    distances, indices = kernels.part_search(*arguments, tile_bytes=tile_bytes, **options)
    expected = kernels.part_search(*arguments, **options)
    assert torch.equal(indices, expected[1])
    # The library's products may round otherwise on another shape; cpp has no tiles of this kind.
    torch.testing.assert_close(distances, expected[0], rtol=0, atol=5e-7)
    if implementation == "cpp":
        assert bitwise_equal(distances, expected[0])


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("unmatched", [-1.0, 0.5, math.nan])
def test_unmatched_ones_come_last_whatever_they_are_called(implementation, unmatched):
    arguments = inputs(6, 25, 2, 4, device=device_of(implementation))
    arguments[1][3] = math.nan
    arguments[3][3] = 1.0
    plain, places = kernels.part_search(*arguments, k=25, implementation=implementation)
    named, indices = kernels.part_search(
        *arguments, k=25, unmatched=unmatched, implementation=implementation
    )
    alone = plain.isinf()
    assert alone.any() and not alone.all() and torch.equal(indices, places)
    torch.testing.assert_close(
        named, plain.masked_fill(alone, unmatched), rtol=0, atol=0, equal_nan=True
    )
    assert bool(plain[:, -1][arguments[2].sum(dim=1) > 0].isnan().all())


@pytest.mark.parametrize("implementation", ALL)
def test_a_distance_too_great_to_hold_is_not_called_unmatched(implementation):
    device = device_of(implementation)
    query = torch.full((1, 1, 2), -3e38, device=device)
    gallery = torch.tensor([[[3e38, 3e38]], [[0.0, 0.0]]], device=device)
    seen = torch.ones(1, 1, device=device), torch.tensor([[1.0], [0.0]], device=device)
    distances, indices = kernels.part_search(
        query,
        gallery,
        *seen,
        k=2,
        metric="euclidean",
        unmatched=-1.0,
        implementation=implementation,
    )
    assert indices.tolist() == [[0, 1]] and distances.tolist() == [[math.inf, -1.0]]


@pytest.mark.parametrize("implementation", ALL)
def test_bool_visibilities_are_zeros_and_ones(implementation):
    query, gallery, *_ = inputs(4, 9, 3, 5, device=device_of(implementation))
    seen = [random(n, 3, seed=n).to(query.device) > 0.0 for n in (4, 9)]
    options = {"implementation": implementation}
    actual = kernels.part_distance(query, gallery, *seen, **options)
    expected = kernels.part_distance(query, gallery, *(s.float() for s in seen), **options)
    assert bitwise_equal(actual, expected)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("metric", METRICS)
def test_mixed_types_meet_in_the_wider_one(implementation, metric):
    query, gallery, seen, shown = inputs(4, 30, 3, 5, device=device_of(implementation))
    options = {"metric": metric, "implementation": implementation}
    stored = gallery.bfloat16()
    actual = kernels.part_distance(query, stored, seen, shown, **options)
    expected = kernels.part_distance(query, stored.float(), seen, shown, **options)
    assert bitwise_equal(actual, expected)
    for position in range(4):
        arguments = [query, gallery, seen, shown]
        arguments[position] = arguments[position].double()
        distances = kernels.part_distance(*arguments, **options)
        nearest, _ = kernels.part_search(*arguments, k=2, **options)
        assert distances.dtype == nearest.dtype == torch.float64
        assert_distances(distances, in_reference(arguments, metric=metric), torch.float64)


@pytest.mark.parametrize("implementation", ALL)
def test_results_want_no_gradient(implementation):
    arguments = [t.requires_grad_() for t in inputs(3, 8, 2, 4, device=device_of(implementation))]
    distances = kernels.part_distance(*arguments, implementation=implementation)
    nearest, _ = kernels.part_search(*arguments, k=2, unmatched=5.0, implementation=implementation)
    assert not distances.requires_grad and not nearest.requires_grad


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("metric", METRICS)
def test_inference_mode_and_autocast_change_no_bit(implementation, metric):
    arguments = inputs(7, 20, 3, 16, device=device_of(implementation))
    options = {"metric": metric, "implementation": implementation}
    expected = kernels.part_distance(*arguments, **options)
    with torch.inference_mode():
        assert bitwise_equal(kernels.part_distance(*arguments, **options), expected)
        kernels.part_search(*arguments, k=3, **options)
    with torch.autocast(arguments[0].device.type, dtype=torch.bfloat16):
        assert bitwise_equal(kernels.part_distance(*arguments, **options), expected)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("metric", METRICS)
def test_compiles_as_one_graph_and_exports(implementation, metric):
    class Search(torch.nn.Module):
        def forward(self, query: Tensor, gallery: Tensor, seen: Tensor, shown: Tensor):
            options = {"metric": metric, "unmatched": 9.0, "implementation": implementation}
            distances = kernels.part_distance(query, gallery, seen, shown, **options)
            return distances, *kernels.part_search(query, gallery, seen, shown, k=4, **options)

    compiled = torch.compile(Search(), fullgraph=True, backend="aot_eager")
    for size in ((6, 11, 2, 5), (9, 14, 2, 5)):
        arguments = inputs(*size, device=device_of(implementation))
        expected = Search()(*arguments)
        assert all(map(bitwise_equal, compiled(*arguments), expected))
    exported = torch.export.export(Search(), arguments).module()
    assert all(map(bitwise_equal, exported(*arguments), expected))


@pytest.mark.parametrize("implementation", fused("part_distance"))
def test_vmap_calls_once_per_sample(implementation):
    arguments = inputs(4, 9, 2, 5, device=device_of(implementation))
    queries = torch.stack([arguments[0], arguments[0].flip(0)])

    def distances(query: Tensor) -> Tensor:
        return kernels.part_distance(query, *arguments[1:], implementation=implementation)

    expected = torch.stack([distances(query) for query in queries])
    assert bitwise_equal(torch.vmap(distances)(queries), expected)


needs_cpp = pytest.mark.skipif(
    kernels.backends.reason_here("part_distance", "cpp") is not None,
    reason="the cpp operators cannot run here",
)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    arguments = inputs(5, 8, 2, 4, dtype=dtype)
    torch.library.opcheck(torch.ops.gsalign.part_distance.default, (*arguments, 1, 2.0))
    torch.library.opcheck(torch.ops.gsalign.part_search.default, (*arguments, 3, 0))


@needs_cpp
def test_a_memory_mapped_gallery_is_searched_where_it_lies(tmp_path):
    query, gallery, seen, shown = inputs(3, 500, 2, 16)
    path = tmp_path / "gallery.npy"
    np.save(path, gallery.half().numpy())
    mapped = torch.from_numpy(np.load(path, mmap_mode="c"))
    tracemalloc.start()
    found = kernels.part_search(query, mapped, seen, shown, k=6, implementation="cpp")
    tracemalloc.stop()
    expected = kernels.part_search(query, gallery.half(), seen, shown, k=6, implementation="cpp")
    assert all(map(bitwise_equal, found, expected))


def test_the_reference_holds_a_tile_and_never_the_whole():
    """Tiles as wide as ``tile_bytes`` says, the last one of what is left."""
    arguments = inputs(10, 100, 2, 3)
    widths = [
        (start, tile.shape)
        for start, tile in reference.distance_tiles(
            *arguments, "cosine", math.inf, torch.float32, 10 * 4 * 33
        )
    ]
    assert widths == [(0, (10, 33)), (33, (10, 33)), (66, (10, 33)), (99, (10, 1))]


GOOD = (torch.zeros(4, 2, 5), torch.zeros(6, 2, 5), torch.ones(4, 2), torch.ones(6, 2))


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize(
    ("position", "value", "error", "words"),
    [
        (0, torch.zeros(4, 5), ValueError, r"query: wanted 3 dimensions \[Q, P, D\].*\[4, 5\]"),
        (0, np.zeros((4, 2, 5)), TypeError, "query: wanted a tensor, got ndarray"),
        (0, torch.zeros(4, 2, 5, dtype=torch.int32), TypeError, "query: .*int32"),
        (1, torch.zeros(6, 2, 4), ValueError, r"gallery: .*\[G, 2, 5\], got \[6, 2, 4\]"),
        (1, torch.zeros(6, 3, 5), ValueError, r"gallery: .*\[G, 2, 5\], got \[6, 3, 5\]"),
        (1, GOOD[1].to("meta"), ValueError, "gallery"),
        (2, torch.ones(5, 2), ValueError, r"query_visibility: .*\[4, 2\], got \[5, 2\]"),
        (2, torch.ones(4, 2, dtype=torch.int64), TypeError, "query_visibility: .*int64"),
        (3, torch.ones(6, 1), ValueError, r"gallery_visibility: .*\[6, 2\], got \[6, 1\]"),
        (3, GOOD[3].to("meta"), ValueError, "gallery_visibility: is on meta"),
        (3, None, TypeError, "gallery_visibility: wanted a tensor, got NoneType"),
    ],
)
def test_errors_name_the_argument(implementation, position, value, error, words):
    device = device_of(implementation)
    arguments: list[object] = [t.to(device) for t in GOOD]
    arguments[position] = value
    with pytest.raises(error, match=words):
        kernels.part_distance(*arguments, implementation=implementation)
    with pytest.raises(error, match=words):
        kernels.part_search(*arguments, k=1, implementation=implementation)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"metric": "l2"}, ValueError, "metric: wanted one of 'cosine', 'euclidean', got 'l2'"),
        ({"k": 7}, ValueError, r"k: wanted 0 to 6 \(the size of the gallery\), got 7"),
        ({"k": -1}, ValueError, "k: wanted 0 to 6"),
        ({"k": 2.0}, TypeError, "k: wanted an integer, got 2.0"),
        ({"k": True}, TypeError, "k: wanted an integer, got True"),
        ({"tile_bytes": 0}, ValueError, "tile_bytes: wanted at least 1, got 0"),
        ({"implementation": "cuda"}, kernels.KernelUnavailableError, "cuda cannot run"),
    ],
)
def test_errors_name_the_option(options, error, words):
    with pytest.raises(error, match=words):
        kernels.part_search(*GOOD, **{"k": 1, **options})


@needs_cpp
def test_the_bare_operators_check_too():
    distance, search = (
        getattr(torch.ops.gsalign, n).default for n in ("part_distance", "part_search")
    )
    distance(*GOOD, 0, 1.0)
    search(*GOOD, 2, 1)
    names = ("query", "gallery", "query_visibility", "gallery_visibility")
    for position, name in enumerate(names):
        whole = GOOD[position]
        wrong_type = whole.int() if name == "gallery" else whole.half()
        for wrong in (whole.unsqueeze(0), wrong_type, whole[:, :1]):
            broken = [*GOOD[:position], wrong, *GOOD[position + 1 :]]
            with pytest.raises(RuntimeError, match=r"query|gallery"):
                distance(*broken, 0, 1.0)
            with pytest.raises(RuntimeError, match=r"query|gallery"):
                search(*broken, 2, 0)
    with pytest.raises(RuntimeError, match="metric"):
        distance(*GOOD, 2, 1.0)
    for k in (-1, 7):
        with pytest.raises(RuntimeError, match="k: wanted 0 to 6"):
            search(*GOOD, k, 0)
