"""``gsalign extract``, ``index`` and ``search`` from end to end, and what they refuse."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cargo_folder import write_image
from PIL import Image

from gsalign.cli.main import main
from gsalign.search import SearchIndex, open_extraction

PLAIN = ("--workers", 0, "--device", "cpu")


@pytest.fixture(scope="module")
def weights(finished) -> Path:
    return finished / "model_final.safetensors"


@pytest.fixture(scope="module")
def embedded(people, weights, tmp_path_factory) -> Path:
    """Embeddings of the gallery; not to be changed."""
    out = tmp_path_factory.mktemp("embedded") / "gallery"
    arguments = ["extract", people / "gallery", "--out", out, "--checkpoint", weights, *PLAIN]
    assert main([str(argument) for argument in [*arguments, "--names", "cargo"]]) == 0
    return out


@pytest.fixture(scope="module")
def index(embedded, tmp_path_factory) -> Path:
    """An index of them; not to be changed."""
    out = tmp_path_factory.mktemp("indexed") / "index"
    assert main(["index", "build", str(embedded), "--out", str(out)]) == 0
    return out


def test_images_are_embedded_indexed_and_found(call, people, weights, embedded, index, tmp_path):
    made = open_extraction(embedded)
    assert len(made) == 8 and set(made.images.views) == {"aerial", "ground"}
    assert "8 embeddings of 24 numbers" in call(
        "extract", people / "gallery", "--out", embedded, "--checkpoint", weights, *PLAIN,
        "--names", "cargo",
    )  # fmt: skip
    told = call("index", "info", index, "--verify", "--recall", 5)
    for text in (
        "images         8",
        "identities     4",
        "aerial 4, ground 4",
        "recall_at_10   1.0",
    ):
        assert text in told
    assert json.loads(call("index", "info", index, "--json"))["metric"] == "cosine"

    # The network is the one the index remembers; every image finds itself first.
    asked = sorted((people / "gallery").rglob("*.jpg"))[:2]
    told = call("search", index, *asked, "-k", 3, *PLAIN, "--names", "cargo")
    assert all(str(path) in told for path in asked) and "recall" not in told
    rows = list(csv.DictReader(io.StringIO(call("search", index, embedded, "--format", "csv"))))
    assert len(rows) == 64
    first = [row for row in rows if row["rank"] == "1"]
    assert all(row["query"] == row["path"] and float(row["distance"]) < 1e-6 for row in first)

    out = tmp_path / "found.json"
    told = call(
        "search", index, embedded, "--format", "json", "--out", out, "--view", "ground",
        "--not-camera", 3, "--by-identity", "--max-distance", 1.5,
    )  # fmt: skip
    assert told == ""
    for answer in json.loads(out.read_text(encoding="utf-8")):
        people_found = [hit["identity"] for hit in answer["hits"]]
        assert len(set(people_found)) == len(people_found)
        assert all(hit["view"] == "ground" and hit["distance"] <= 1.5 for hit in answer["hits"])
    assert "recall of the 4 nearest: 1.0000" in call(
        "search", index, embedded, "-k", 4, "--recall", "--exact"
    )


def test_an_index_is_changed(call, refuse, people, weights, embedded, index, tmp_path):
    own = Path(shutil.copytree(index, tmp_path / "own"))
    more = tmp_path / "more"
    call(
        "extract", people / "query", "--out", more, "--checkpoint", weights, *PLAIN,
        "--names", "cargo",
    )  # fmt: skip
    assert "16 images, exact, 1 shard" in call("index", "add", own, more)
    path = open_extraction(more).images.paths[3]
    told = call("index", "remove", own, "--identity", 101, "--path", path, "--id", 5)
    assert "removed 6 images" in told and "10 images" in told
    # Five of the eight are still in it.
    assert "5 of 8 images are in" in refuse("index", "add", own, more)
    assert "13 images" in call("index", "add", own, more, "--replace")


def test_a_graph_in_shards(call, embedded, tmp_path):
    pytest.importorskip("faiss")
    told = call(
        "index", "build", embedded, "--out", tmp_path / "i", "--kind", "hnsw", "--shards", 3
    )
    assert "8 images, hnsw, 3 shards" in told
    assert len(call("search", tmp_path / "i", embedded, "--format", "csv").splitlines()) == 65


def test_a_page_with_pictures(call, people, weights, tmp_path):
    root = tmp_path / '<script>alert(1)</script> & "people"'
    for number in range(3):
        write_image(root / f"'{number}' <b>.png", seed=number)
    call("extract", root, "--out", tmp_path / "e", "--checkpoint", weights, *PLAIN)
    call("index", "build", tmp_path / "e", "--out", tmp_path / "i")
    (root / "'2' <b>.png").unlink()
    call("search", tmp_path / "i", tmp_path / "e", "--html", tmp_path / "p.html")
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "<script" not in page and "<b>." not in page and "&lt;script&gt;" in page
    assert "http" not in page.replace("http-equiv", "")
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert len(pictures) == 8 and page.count("not there") == 4
    for picture in pictures:
        with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
            assert max(image.size) >= 24


def test_milvus_files_hold_the_index(call, index, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    told = call("index", "export", index, "--out", tmp_path / "m", "--rows", 5)
    assert "part-000001.parquet" in told and "collection.json" in told
    document = json.loads((tmp_path / "m" / "collection.json").read_text(encoding="utf-8"))
    tables = [parquet.read_table(tmp_path / "m" / name) for name in document["files"]]
    assert [len(table) for table in tables] == [5, 3]
    opened = SearchIndex.open(index)
    vectors = [row for table in tables for row in table["vector"].to_pylist()]
    assert vectors == [row for _, _, block in opened.blocks(8) for row in block.tolist()]
    for name, wanted in (
        ("id", opened.ids.tolist()),
        ("path", list(opened.images.paths)),
        ("view", list(opened.images.views)),
    ):
        assert [value for table in tables for value in table[name].to_pylist()] == wanted
    fields = {field["name"]: field for field in document["fields"]}
    assert list(fields) == tables[0].column_names
    assert fields["vector"]["dim"] == 24
    assert fields["path"]["max_length"] == max(len(path.encode()) for path in opened.images.paths)


def test_ctrl_c_loses_nothing(people, weights, tmp_path):
    """A real interrupt of a real process, once it has begun to embed."""
    out = tmp_path / "out"
    images = tmp_path / "images"
    for number in range(60):
        write_image(images / f"{number:02}.jpg", seed=number)
    arguments = ["extract", images, "--out", out, "--checkpoint", weights, "--device", "cpu"]
    command = [sys.executable, "-m", "gsalign.cli", *map(str, arguments), "--batch-size", "1"]
    process = subprocess.Popen(
        [*command, "--workers", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()  # a tenth is done
    # As a terminal does: to the process and to its loaders.
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=600)
    if process.returncode == 0:
        pytest.skip("the machine embedded faster than it could be interrupted")
    assert process.returncode == 130
    assert re.fullmatch(r"gsalign: stopped after \d+ of 60 images; .* from there\n", told)
    done = int(re.findall(r"\d+", told)[0])
    assert done >= 6
    assert main([*command[3:], "--workers", "0"]) == 0
    assert len(open_extraction(out)) == 60


def test_broken_images_are_counted(call, refuse, weights, tmp_path):
    write_image(tmp_path / "in" / "good ü.jpg", seed=1)
    (tmp_path / "in" / "bad.jpg").write_bytes(b"\xff\xd8\xff")
    arguments = ("extract", tmp_path / "in", "--checkpoint", weights, *PLAIN)
    told = call(*arguments, "--out", tmp_path / "out")
    assert "1 of 2 images could not be read" in told and "bad.jpg cannot be read" in told
    told = refuse(*arguments, "--out", tmp_path / "strict", "--strict")
    assert "bad.jpg" in told and "--strict" in told
    (tmp_path / "in" / "good ü.jpg").unlink()
    told = refuse(*arguments, "--out", tmp_path / "none")
    assert "none of 1 images can be read" in told


def test_what_cannot_be_extracted_is_told(refuse, people, weights, tmp_path):
    out = ("--out", tmp_path / "out", *PLAIN)
    known = ("--checkpoint", weights)
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refuse("extract", tmp_path / "empty", *out, *known)
    assert "does not exist" in refuse("extract", tmp_path / "none", *out, *known)
    assert "no checkpoint at" in refuse(
        "extract", people, *out, "--checkpoint", tmp_path / "x.safetensors"
    )
    assert "batch_size is 0" in refuse("extract", people, *out, *known, "--batch-size", 0)
    assert "workers is -1" in refuse("extract", people, *out, *known, "--workers", -1)
    assert "--checkpoint" in refuse("extract", people, *out)
    assert "unknown key 'model.wdth'" in refuse("extract", people, *out, *known, "model.wdth=1")


def test_what_cannot_be_indexed_or_searched_is_told(
    refuse, people, settings, embedded, index, tmp_path
):
    assert "is not a folder of embeddings" in refuse("index", "build", people, "--out", tmp_path)
    assert "holds other files" in refuse("index", "build", embedded, "--out", index)
    told = refuse("index", "build", embedded, "--out", tmp_path / "i", "--shards", 0)
    assert "--shards is 0" in told
    told = refuse("index", "build", embedded, "--out", tmp_path / "i", "--neighbours", 1)
    assert "--neighbours is 1" in told
    assert "nothing to remove" in refuse("index", "remove", index)
    assert "no image with identity 999" in refuse("index", "remove", index, "--identity", 999)
    assert "is not an index" in refuse("search", embedded, embedded)
    told = refuse("search", index, embedded, "--camera", 77)
    assert "no image of camera '77'; its cameras: 3, 6" in told
    assert "-k is 0" in refuse("search", index, embedded, "-k", 0)
    assert "--recall is 0" in refuse("index", "info", index, "--recall", 0)
    assert "rows is 0" in refuse("index", "export", index, "--out", tmp_path / "m", "--rows", 0)


def test_an_index_of_another_model_is_told(
    call, refuse, people, settings, weights, index, tmp_path
):
    image = next((people / "query").rglob("*.jpg"))
    told = refuse("search", index, image, *PLAIN, "--flip-test", "mean")
    assert "index of another model or preprocessing (flip_test off against mean)" in told
    own = Path(shutil.copytree(index, tmp_path / "own"))
    manifest = own / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(weights), "/gone.safetensors"))
    told = refuse("search", own, image, *PLAIN)
    assert "/gone.safetensors" in told and "--checkpoint" in told
    assert str(image) in call("search", own, image, *PLAIN, "--checkpoint", weights)
    (tmp_path / "bad.jpg").touch()
    told = refuse("search", index, tmp_path / "bad.jpg", *PLAIN)
    assert "none of the 1 queries can be read" in told
