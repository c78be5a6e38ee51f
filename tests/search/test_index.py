"""The index: exact answers, changes that survive, kinds that agree, damage that is told."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from search_support import make_extraction

import gsalign.extras as extras
import gsalign.search.budget as budget
import gsalign.search.index as index_module
from gsalign.errors import ConfigError, DataError
from gsalign.evaluation import pairwise_distances
from gsalign.search import (
    Filter,
    Fingerprint,
    IndexSettings,
    MemoryLimitError,
    MissingExtraError,
    SearchIndex,
)
from gsalign.search.answers import Hit, best_of_each_identity
from gsalign.search.changing import changing

KINDS = ("exact", "hnsw", "ivfpq")
COUNT = 600


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_extraction(tmp_path_factory.mktemp("plain") / "e", COUNT)


@pytest.fixture(scope="module")
def parted(tmp_path_factory):
    return make_extraction(tmp_path_factory.mktemp("parted") / "e", COUNT, slots=3)


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    return make_extraction(tmp_path_factory.mktemp("more") / "e", 100, seed=2, first=COUNT)


def needs(kind):
    if kind != "exact":
        pytest.importorskip("faiss")


def queries(extraction, count=15, seed=9):
    rng = np.random.default_rng(seed)
    rows = rng.choice(len(extraction), count, replace=False)
    noisy = extraction.embeddings[rows] + 0.02 * rng.standard_normal(
        (count, extraction.manifest.dimension)
    )
    return (noisy / np.linalg.norm(noisy, axis=1, keepdims=True)).astype(np.float32)


def true_distances(extraction, asked):
    """By the evaluation's own distances, in float64."""
    stored = np.array(extraction.embeddings, np.float64)
    slots = extraction.manifest.slots
    if slots == 1:
        return pairwise_distances(torch.from_numpy(asked).double(), stored).numpy()
    one, two = (
        torch.from_numpy(np.array(v, np.float64)).unflatten(1, (slots, -1)) for v in (asked, stored)
    )
    seen = (one.square().sum(2), two.square().sum(2))
    return pairwise_distances(one, two, visibility=seen).numpy()


def ids_of(answers):
    return [[hit.id for hit in hits] for hits in answers]


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("shard_size", [1000, 250, 7])
def test_exact_answers_are_exact(plain, parted, tmp_path, slots, shard_size):
    source = plain if slots == 1 else parted
    asked = queries(source)
    truth = true_distances(source, asked)
    built = SearchIndex.build(source, tmp_path / "i", IndexSettings(shard_size=shard_size))
    index = SearchIndex.open(built.root)
    answers = index.search(asked, 12, made_by=source.manifest.fingerprint)
    assert ids_of(answers) == np.argsort(truth, axis=1)[:, :12].tolist()
    for row, hits in zip(truth, answers, strict=True):
        for hit in hits:
            assert hit.distance == pytest.approx(row[hit.id], abs=2e-6)
            assert hit.path == f"/images/{hit.id}.jpg" and hit.identity == str(hit.id // 5)
            assert hit.camera == str(hit.id % 7)
    assert index.manifest.metric == ("cosine" if slots == 1 else "part cosine")


@pytest.mark.parametrize("kind", ["hnsw", "ivfpq"])
def test_exact_answers_are_those_of_faiss(plain, tmp_path, kind):
    faiss = pytest.importorskip("faiss")
    asked = queries(plain)
    _, rows = faiss.knn(asked, np.array(plain.embeddings), 10, metric=faiss.METRIC_INNER_PRODUCT)
    index = SearchIndex.build(plain, tmp_path / "i", IndexSettings(kind=kind))
    assert ids_of(index.search(asked, 10, exact=True)) == rows.tolist()


@pytest.mark.parametrize("kind", ["hnsw", "ivfpq"])
@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("shard_size", [1000, 250])
def test_approximate_answers_are_ranked_exactly(plain, parted, tmp_path, kind, slots, shard_size):
    needs(kind)
    source = plain if slots == 1 else parted
    asked = queries(source)
    settings = IndexSettings(kind=kind, shard_size=shard_size)
    SearchIndex.build(source, tmp_path / "i", settings)
    index = SearchIndex.open(tmp_path / "i")
    exact = index.search(asked, 5, exact=True)
    assert index.recall(asked, 5) > 0.9
    found = index.search(asked, 5)
    for one, two in zip(exact, found, strict=True):
        told = {hit.id: hit.distance for hit in one}
        for hit in two:
            assert hit.distance == pytest.approx(told.get(hit.id, hit.distance), abs=1e-6)
        assert [hit.distance for hit in two] == sorted(hit.distance for hit in two)
    # When the short list holds all and the walk leaves nothing out, nothing is lost.
    assert ids_of(index.search(asked, 5, shortlist=COUNT, effort=COUNT)) == ids_of(exact)


def test_shards_of_lists_find_what_one_finds(plain, tmp_path):
    pytest.importorskip("faiss")
    asked = queries(plain)
    answers = []
    for shard_size in (1000, 97):
        settings = IndexSettings(kind="ivfpq", shard_size=shard_size, lists=8)
        index = SearchIndex.build(plain, tmp_path / str(shard_size), settings)
        # Every shard has the same lists and codes, so that the same images are candidates.
        answers.append(ids_of(index.search(asked, 5, shortlist=COUNT, effort=3)))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scan_below", [0, 10_000])
def test_filters(plain, tmp_path, monkeypatch, kind, scan_below):
    needs(kind)
    monkeypatch.setattr(index_module, "SCAN_BELOW", scan_below)
    asked = queries(plain)
    truth = true_distances(plain, asked)
    index = SearchIndex.build(plain, tmp_path / "i", IndexSettings(kind=kind, shard_size=250))
    numbers = np.arange(COUNT)
    for only, keep in (
        (Filter(view="ground"), numbers % 2 == 1),
        (Filter(cameras=["3", "5"]), np.isin(numbers % 7, [3, 5])),
        (Filter(other_than=["3"]), numbers % 7 != 3),
        (Filter(view="aerial", cameras=["6"]), (numbers % 7 == 6) & (numbers % 2 == 0)),
    ):
        wanted = np.argsort(np.where(keep, truth, np.inf), axis=1)[:, :5].tolist()
        found = ids_of(index.search(asked, 5, only=only, shortlist=COUNT, effort=COUNT))
        assert found == wanted
    assert index.search(asked, 5, only=Filter(cameras=["attic"])) == [()] * len(asked)


def test_filters_that_are_none_are_told():
    with pytest.raises(ConfigError, match="view is 'drone'"):
        Filter(view="drone")
    with pytest.raises(ConfigError, match="cameras is a text"):
        Filter(cameras="12")


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_of_each_identity(plain, tmp_path, kind):
    needs(kind)
    asked = queries(plain)
    truth = true_distances(plain, asked)
    index = SearchIndex.build(plain, tmp_path / "i", IndexSettings(kind=kind))
    options = {"shortlist": COUNT, "effort": COUNT, "by_identity": True}
    nearest = truth.reshape(len(asked), -1, 5).min(axis=2)
    for hits, row in zip(index.search(asked, 9, **options), nearest, strict=True):
        assert [int(hit.identity) for hit in hits] == np.argsort(row)[:9].tolist()
    # More people than there are: each of them once.
    hits = index.search(asked[:1], 1000, **options)[0]
    assert sorted(int(hit.identity) for hit in hits) == list(range(COUNT // 5))


def test_images_without_identity_stand_for_themselves():
    hits = [Hit(n, 0.1 * n, "", name, "", "") for n, name in enumerate(["a", "", "a", "", "b"])]
    assert [hit.id for hit in best_of_each_identity(hits, 10)] == [0, 1, 3, 4]
    assert [hit.id for hit in best_of_each_identity(hits, 2)] == [0, 1]


def test_of_equal_distances_the_lower_id_comes_first(tmp_path):
    source = make_extraction(tmp_path / "e", 40)
    same = np.load(source.root / "embeddings.npy")
    same[:] = same[0]
    index = SearchIndex.build(source, tmp_path / "i", IndexSettings(shard_size=7))
    for shard in index._shards:
        shard.vectors[:] = same[0]
    assert ids_of(index.search(same[:1], 20)) == [list(range(20))]
    assert ids_of(index.search(same[:1], 4, only=Filter(view="ground"))) == [[1, 3, 5, 7]]


@pytest.mark.parametrize("kind", KINDS)
def test_adding_and_removing(plain, more, tmp_path, kind):
    needs(kind)
    root = tmp_path / "i"
    index = SearchIndex.build(plain, root, IndexSettings(kind=kind, shard_size=250))
    index.add(more)
    assert len(index) == 700 and index.ids.tolist() == list(range(700))
    assert [shard.count for shard in index.manifest.shards] == [250, 250, 200]
    asked = queries(more)
    rows = true_distances(more, asked).argmin(axis=1)
    assert [hits[0].id for hits in index.search(asked, 1)] == (rows + COUNT).tolist()

    assert index.remove(identities=["0", "139"], ids=[300], paths=["/images/301.jpg"]) == 12
    gone = {*range(5), *range(695, 700), 300, 301}
    left = [number for number in range(700) if number not in gone]
    reopened = SearchIndex.open(root)
    reopened.verify()
    assert reopened.ids.tolist() == left
    found = reopened.search(plain.embeddings[[0, 300, 6]], 700, exact=True)
    assert not gone & {hit.id for hits in found for hit in hits}
    assert found[2][0].id == 6
    # Ids are not given twice, even those of the last images.
    reopened.add(make_extraction(tmp_path / "e", 5, first=900))
    assert reopened.ids.tolist() == [*left, *range(700, 705)]
    names = {path.name for path in root.iterdir()} - {".lock"}
    assert names == reopened.manifest.file_names()


def test_what_is_removed_leaves_the_disk(plain, tmp_path):
    index = SearchIndex.build(plain, tmp_path / "i", IndexSettings(shard_size=250))
    secret = plain.embeddings[123].tobytes()

    def found():
        return any(secret in path.read_bytes() for path in index.root.iterdir())

    assert found()
    index.remove(ids=[123])
    assert not found()
    assert b"/images/123.jpg" not in b"".join(p.read_bytes() for p in index.root.iterdir())
    index.remove(ids=index.ids.tolist())
    assert len(index) == 0 and index.search(plain.embeddings[:2], 3) == [(), ()]


def test_images_that_are_there_already_are_replaced_on_request_only(plain, tmp_path):
    index = SearchIndex.build(plain, tmp_path / "i")
    again = make_extraction(tmp_path / "again", 10, seed=5, first=COUNT - 4)
    with pytest.raises(DataError, match=r"4 of 10 images are in .*--replace"):
        index.add(again)
    assert len(index) == COUNT
    index.add(again, replace=True)
    assert index.ids.tolist() == [*range(COUNT - 4), *range(COUNT, COUNT + 10)]
    assert index.search(again.embeddings[:1], 1)[0][0].path == f"/images/{COUNT - 4}.jpg"


def test_small_additions_do_not_pile_up(tmp_path):
    index = SearchIndex.build(make_extraction(tmp_path / "e", 64), tmp_path / "i")
    for number in range(12):
        index.add(make_extraction(tmp_path / f"e{number}", 1, first=100 + number))
    counts = [shard.count for shard in index.manifest.shards]
    assert counts[0] == 64 and sum(counts) == 76 and len(counts) <= 5
    assert index.ids.tolist() == list(range(76))


def test_a_crash_leaves_the_index_as_it_was(plain, more, tmp_path, monkeypatch):
    index = SearchIndex.build(plain, tmp_path / "i")
    before = index.manifest

    def crash(*_):
        raise OSError(28, "No space left on device")

    for change in (
        lambda: index.add(more),
        lambda: index.remove(ids=[3]),
        lambda: SearchIndex.build(more, index.root, overwrite=True),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(index_module, "write_document", crash)
            with pytest.raises(OSError, match="No space"):
                change()
        reopened = SearchIndex.open(index.root)
        reopened.verify()
        assert reopened.manifest == before
    # What the crashes left behind goes with the next change.
    reopened.remove(ids=[3])
    names = {path.name for path in index.root.iterdir()} - {".lock"}
    assert names == reopened.manifest.file_names()


def test_one_process_changes_an_index_at_a_time(plain, tmp_path):
    index = SearchIndex.build(plain, tmp_path / "i")
    with changing(index.root), pytest.raises(DataError, match="another process is changing"):
        index.remove(ids=[3])
    other = SearchIndex.open(index.root)
    other.remove(ids=[3])
    # A change starts from what is on the disk, not from what was opened.
    index.remove(ids=[4])
    assert len(SearchIndex.open(index.root)) == COUNT - 2


def test_an_index_of_another_model_is_told(plain, tmp_path):
    index = SearchIndex.build(plain, tmp_path / "i")
    stranger = make_extraction(tmp_path / "s", 5, network="b" * 64)
    other = Fingerprint(network="a" * 64, preprocessing={"flip_test": "mean"})
    for attempt, told in (
        (lambda: index.add(stranger), "network aaaaaaaaaaaa against bbbbbbbbbbbb"),
        (lambda: SearchIndex.build([plain, stranger], tmp_path / "j"), "network"),
        (lambda: index.search(plain.embeddings[:1], made_by=other), "flip_test off against mean"),
    ):
        with pytest.raises(DataError, match=f"index of another model or preprocessing .*{told}"):
            attempt()


def test_wrong_calls_are_told(plain, tmp_path):
    index = SearchIndex.build(plain, tmp_path / "i")
    one = plain.embeddings[:1]
    for call, error, told in (
        (lambda: index.search(one, 0), ConfigError, "k is 0"),
        (lambda: index.search(one, effort=-1), ConfigError, "effort is -1"),
        (lambda: index.search(one[:, :5]), DataError, r"queries are \[1, 5\]; wanted \[Q, 32\]"),
        (lambda: index.search(one[0]), DataError, r"queries are \[32\]"),
        (lambda: index.search(one * np.nan), DataError, "not finite"),
        (lambda: index.remove(ids=[3, 9999]), DataError, "no image with id 9999"),
        (lambda: index.remove(identities=["nobody"]), DataError, "identity nobody"),
        (lambda: SearchIndex.build([], tmp_path / "j"), DataError, "sources is empty"),
        (lambda: SearchIndex.build([plain, plain], tmp_path / "j"), DataError, "600 images are in"),
        (lambda: SearchIndex.build(plain, index.root), DataError, "holds other files"),
        (lambda: SearchIndex.open(tmp_path), DataError, "is not an index"),
    ):
        with pytest.raises(error, match=told):
            call()
    assert len(index) == COUNT


def test_limits_of_lists_and_codes_are_told(plain, tmp_path):
    pytest.importorskip("faiss")
    with pytest.raises(ConfigError, match="code_size is 5; wanted a divisor of 32"):
        SearchIndex.build(plain, tmp_path / "i", IndexSettings(kind="ivfpq", code_size=5))
    with pytest.raises(DataError, match="learns 256 codes and has 100 images"):
        few = make_extraction(tmp_path / "e", 100)
        SearchIndex.build(few, tmp_path / "j", IndexSettings(kind="ivfpq"))


def test_what_does_not_fit_into_memory_is_refused(plain, tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(budget, "available_memory", lambda: 10_000)
    settings = IndexSettings(kind="hnsw")
    with pytest.raises(MemoryLimitError, match=r"hnsw over 600 .* about .* GiB .* --force"):
        SearchIndex.build(plain, tmp_path / "i", settings)
    assert not (tmp_path / "i").exists()
    assert len(SearchIndex.build(plain, tmp_path / "i", settings, force=True)) == COUNT


def test_the_estimate_grows_with_what_is_held():
    def needed(kind, count=1_000_000, **changes):
        return budget.build_bytes(IndexSettings(kind=kind, **changes), count, 768, 96)

    # An exact index holds its table and a block; a graph 2 bytes a number and its edges.
    assert needed("exact") < 0.7 * 2**30
    assert needed("hnsw") - needed("exact") == 1_000_000 * (768 * 2 + 64 * 4 + 16)
    assert needed("hnsw", shard_size=100_000) < 0.4 * needed("hnsw")
    assert needed("exact") < needed("ivfpq", shard_size=1) < needed("ivfpq")


def test_a_missing_package_is_told(plain, tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(extras, "import_module", missing)
    with pytest.raises(MissingExtraError, match=r"needs faiss.*pip install 'gsalign\[search\]'"):
        SearchIndex.build(plain, tmp_path / "i", IndexSettings(kind="hnsw"))
    # The exact kind needs nothing.
    index = SearchIndex.build(plain, tmp_path / "i")
    assert index.search(plain.embeddings[7:8], 1)[0][0].id == 7


@pytest.mark.parametrize("suffix", [".npy", ".csv", ".faiss"])
def test_damage_is_told_before_the_file_is_used(plain, tmp_path, suffix):
    pytest.importorskip("faiss")
    index = SearchIndex.build(plain, tmp_path / "i", IndexSettings(kind="hnsw"))
    path = next(index.root.glob(f"shard-*{suffix}"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="sha256 differs"):
        opened = SearchIndex.open(index.root)
        if suffix == ".faiss":
            opened.search(plain.embeddings[:1])
        opened.verify()
    path.write_bytes(data[:-1])
    with pytest.raises(DataError, match="were written: the folder is damaged"):
        SearchIndex.open(index.root)
    path.unlink()
    with pytest.raises(DataError, match="is missing"):
        SearchIndex.open(index.root)


def test_a_manifest_cannot_point_elsewhere(plain, tmp_path):
    index = SearchIndex.build(plain, tmp_path / "i")
    document = json.loads((index.root / "manifest.json").read_text())
    for change in ({"name": "../../etc/shard-000000"}, {"count": 0}):
        broken = {**document, "shards": [{**document["shards"][0], **change}]}
        (index.root / "manifest.json").write_text(json.dumps(broken))
        with pytest.raises(DataError, match=rf"is not an index.*shards\.0\.{next(iter(change))}"):
            SearchIndex.open(index.root)


def test_an_index_can_be_moved(plain, tmp_path):
    index = SearchIndex.build(plain, tmp_path / "i")
    moved = SearchIndex.open(shutil.move(index.root, tmp_path / "elsewhere"))
    assert moved.search(plain.embeddings[7:8], 1)[0][0].id == 7


def test_blocks_and_samples_are_the_stored_vectors(plain, tmp_path):
    index = SearchIndex.build(plain, tmp_path / "i", IndexSettings(shard_size=250))
    blocks = list(index.blocks(200))
    assert [len(ids) for ids, _, _ in blocks] == [200, 50, 200, 50, 100]
    assert np.array_equal(np.concatenate([block for _, _, block in blocks]), plain.embeddings)
    assert np.array_equal(index.sample(3), plain.embeddings[[0, 299, 599]])
    assert len(index.sample(10_000)) == COUNT


@pytest.mark.parametrize("kind", ["hnsw", "ivfpq"])
def test_an_index_that_faiss_cannot_write_is_told(plain, tmp_path, monkeypatch, kind):
    faiss = pytest.importorskip("faiss")
    write = faiss.write_index
    monkeypatch.setattr(faiss, "write_index", lambda index, _: write(index, str(tmp_path / "no/x")))
    with pytest.raises(OSError, match=r"\.faiss cannot be written: .*No such file"):
        SearchIndex.build(plain, tmp_path / "i", IndexSettings(kind=kind))


@pytest.mark.parametrize(
    ("kind", "change", "told"),
    [
        ("exact", {"slots": 3}, "dimension 32 is no multiple of slots 3"),
        ("exact", {"slots": 2}, r"shard-000000 has .*; a shard of exact with 2 slots has .*vis"),
        ("exact", {"next_id": 5}, "next_id 5 was given already"),
        ("exact", {"next_shard": 0}, "next_shard 0, or another number, is of two shards"),
        ("exact", {"settings": {"kind": "hnsw"}}, r"shard-000000 has .*; a shard of hnsw .*faiss"),
        ("ivfpq", {"trained": None}, "a trained index belongs to ivfpq"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_told(plain, tmp_path, kind, change, told):
    needs(kind)
    index = SearchIndex.build(plain, tmp_path / "i", IndexSettings(kind=kind))
    path = index.root / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    for attempt in (lambda: SearchIndex.open(index.root), lambda: index.remove(ids=[3])):
        with pytest.raises(DataError, match=told):
            attempt()


@pytest.mark.parametrize("kind", ["exact", "hnsw"])
def test_what_fails_leaves_no_files_behind(plain, more, tmp_path, monkeypatch, kind):
    needs(kind)
    index = SearchIndex.build(plain, tmp_path / "i", IndexSettings(kind=kind))
    names = {path.name for path in index.root.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(index_module, "write_document", lambda *_: 1 / 0)
        for change in (lambda: index.add(more), lambda: SearchIndex.build(more, tmp_path / "j")):
            with pytest.raises(ZeroDivisionError):
                change()
    assert {path.name for path in index.root.iterdir()} == names
    # And is no hindrance to another attempt.
    assert len(SearchIndex.build(more, tmp_path / "j")) == len(more)


def test_files_of_others_survive_a_build_in_their_folder(plain, tmp_path):
    (tmp_path / "shard-000000.tar").write_text("precious")
    (tmp_path / "shard-of-glass.npy").write_text("precious")
    with pytest.raises(DataError, match="holds other files"):
        SearchIndex.build(plain, tmp_path)
    index = SearchIndex.build(plain, tmp_path, overwrite=True)
    index.remove(ids=[3])
    assert (tmp_path / "shard-000000.tar").exists() and (tmp_path / "shard-of-glass.npy").exists()


def test_an_index_that_appears_meanwhile_is_not_replaced(plain, more, tmp_path, monkeypatch):
    """Another process makes one while this build looks at the memory."""
    root = tmp_path / "i"

    def meanwhile(*_):
        monkeypatch.setattr(index_module, "require_memory", lambda *_: None)
        SearchIndex.build(more, root)

    monkeypatch.setattr(index_module, "require_memory", meanwhile)
    with pytest.raises(DataError, match="holds other files"):
        SearchIndex.build(plain, root)
    assert len(SearchIndex.open(root)) == len(more)


def test_a_name_in_force_is_not_used_again(plain, tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    settings = IndexSettings(kind="ivfpq")
    index = SearchIndex.build(plain, tmp_path / "i", settings)
    index.remove(ids=index.ids.tolist())
    with monkeypatch.context() as patch:
        patch.setattr(index_module, "write_document", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            other = make_extraction(tmp_path / "e", 300, seed=4)
            SearchIndex.build(other, index.root, settings, overwrite=True)
    SearchIndex.open(index.root).verify()
