"""Embedding a collection into a folder: interrupted, damaged, repeated."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from search_support import tiny_network

from gsalign.errors import ConfigError, DataError
from gsalign.search import Embedder, extract, list_images, open_extraction
from gsalign.search.changing import changing
from gsalign.search.stream import EmbeddingStream


def test_embeddings_are_those_of_the_images(embedder, photographs, tmp_path):
    images = list_images([photographs])
    made = extract(embedder, images, tmp_path / "out", shard_size=4)
    assert made.images == images and made.skipped == ()
    np.testing.assert_allclose(made.embeddings, embedder(list(images.paths)), atol=1e-6)
    assert sorted(path.name for path in made.root.iterdir()) == [
        "embeddings.json", "embeddings.npy", "images.csv",
    ]  # fmt: skip
    plain = np.load(made.root / "embeddings.npy", allow_pickle=False)
    assert plain.dtype == np.float32 and plain.shape == (11, embedder.dimension)
    # In a loader process of its own the images are the same.
    again = extract(embedder, images, tmp_path / "again", workers=1)
    assert np.array_equal(again.embeddings, made.embeddings)


def test_a_table_in_parquet(embedder, photographs, tmp_path):
    pytest.importorskip("pyarrow")
    images = list_images([photographs])
    made = extract(embedder, images, tmp_path / "out", table="parquet")
    assert (tmp_path / "out" / "images.parquet").is_file()
    assert open_extraction(made.root).images == images


@pytest.mark.parametrize("shard_size", [1, 1000])
def test_a_broken_image_at_the_end_of_a_batch_is_named_once(
    embedder, own_photographs, tmp_path, monkeypatch, shard_size
):
    images = list_images([own_photographs])
    for place in (7, 10):
        Path(images.paths[place]).write_bytes(b"")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("gsalign.search.extraction.EmbeddingStream", Interrupted)
        with pytest.raises(KeyboardInterrupt, match="stopped after 8 of 11 images"):
            extract(embedder, images, out, shard_size=shard_size)
    made = extract(embedder, images, out)
    assert len(made) == 9 and len(made.skipped) == 2
    assert made.images == images.select([*range(7), 8, 9])


def test_a_broken_image_that_was_replaced_is_read(embedder, own_photographs, tmp_path):
    images, out = list_images([own_photographs]), tmp_path / "out"
    whole = Path(images.paths[6]).read_bytes()
    Path(images.paths[6]).write_bytes(b"")
    with pytest.raises(DataError, match="replace it, or go on without it"):
        extract(embedder, images, out, strict=True)
    Path(images.paths[6]).write_bytes(whole)
    made = extract(embedder, images, out, strict=True)
    assert len(made) == 11 and made.skipped == ()


def test_what_was_left_out_before_is_no_less_an_error(
    embedder, own_photographs, tmp_path, monkeypatch
):
    images, out = list_images([own_photographs]), tmp_path / "out"
    Path(images.paths[1]).write_bytes(b"")
    interrupt(embedder, images, out, monkeypatch)
    for _ in range(2):
        with pytest.raises(DataError, match="left out before: replace it and start again by --ov"):
            extract(embedder, images, out, strict=True)
        assert len(extract(embedder, images, out).skipped) == 1


class Interrupted(EmbeddingStream):
    """Ctrl-C after some batches."""

    after = 2

    def __iter__(self):
        for number, batch in enumerate(super().__iter__()):
            if number == self.after:
                raise KeyboardInterrupt
            yield batch


@pytest.mark.parametrize("shard_size", [1, 5, 1000])
def test_an_interrupted_extraction_goes_on_and_gives_the_same(
    embedder, own_photographs, tmp_path, monkeypatch, shard_size
):
    broken = own_photographs / "camera 0" / "img4.jpg"
    broken.write_bytes(b"")
    images = list_images([own_photographs])
    whole = extract(embedder, images, tmp_path / "whole")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("gsalign.search.extraction.EmbeddingStream", Interrupted)
        with pytest.raises(KeyboardInterrupt, match="stopped after 8 of 11 images"):
            extract(embedder, images, out, shard_size=shard_size)
    with pytest.raises(DataError, match="is unfinished"):
        open_extraction(out)
    seen = []
    resumed = extract(embedder, images, out, progress=lambda done, total: seen.append(done))
    assert seen[0] > 8, "images that were done were embedded again"
    assert np.array_equal(resumed.embeddings, whole.embeddings)
    assert resumed.images == whole.images
    assert resumed.skipped == whole.skipped and len(resumed.skipped) == 1
    assert str(broken) in resumed.skipped[0]


def interrupt(embedder, images, out, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("gsalign.search.extraction.EmbeddingStream", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            extract(embedder, images, out)


def test_another_extraction_does_not_go_on_with_it(embedder, photographs, tmp_path, monkeypatch):
    images, out = list_images([photographs]), tmp_path / "out"
    interrupt(embedder, images, out, monkeypatch)
    other = Embedder(tiny_network(seed=1))
    with pytest.raises(DataError, match=r"unfinished extraction of something else \(network"):
        extract(other, images, out)
    with pytest.raises(DataError, match="other images or labels"):
        extract(embedder, images.select(range(5)), out)
    # Nothing was lost by asking.
    assert len(list((out / "unfinished").glob("*.safetensors"))) == 1
    # Nor by asking while another process is at it.
    with changing(out), pytest.raises(DataError, match="another process is changing"):
        extract(embedder, images, out)
    made = extract(other, images, out, overwrite=True)
    np.testing.assert_allclose(made.embeddings, other(list(images.paths)), atol=1e-6)


def test_a_damaged_shard_is_told(embedder, photographs, tmp_path, monkeypatch):
    images, out = list_images([photographs]), tmp_path / "out"
    interrupt(embedder, images, out, monkeypatch)
    shard = next((out / "unfinished").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(DataError, match=r"is damaged.*--overwrite starts again"):
        extract(embedder, images, out)
    assert len(extract(embedder, images, out, overwrite=True)) == 11


def test_a_crash_between_the_last_files_is_mended(embedder, photographs, tmp_path, monkeypatch):
    images, out = list_images([photographs]), tmp_path / "out"

    def crash(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("gsalign.search.extraction.write_table", crash)
        with pytest.raises(OSError, match="No space"):
            extract(embedder, images, out)
    with monkeypatch.context() as patch:
        patch.setattr("gsalign.search.extraction.EmbeddingStream", crash)
        assert len(extract(embedder, images, out)) == 11


def test_finished_embeddings_stay_unless_replaced(embedder, photographs, tmp_path, monkeypatch):
    images, out = list_images([photographs]), tmp_path / "out"
    made = extract(embedder, images, out)
    stamp = (out / "embeddings.npy").stat().st_mtime_ns
    assert extract(embedder, images, out).manifest == made.manifest
    assert (out / "embeddings.npy").stat().st_mtime_ns == stamp
    other = Embedder(tiny_network(), flip_test="mean", batch_size=4)
    with pytest.raises(DataError, match=r"holds other embeddings \(flip_test off against mean"):
        extract(other, images, out)
    # The old ones stay valid until the new ones are there.
    with monkeypatch.context() as patch:
        patch.setattr("gsalign.search.extraction.EmbeddingStream", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            extract(other, images, out, overwrite=True)
    assert open_extraction(out).manifest == made.manifest
    new = extract(other, images, out, overwrite=True)
    assert new.manifest.fingerprint == other.fingerprint
    assert not (out / "unfinished").exists()


def test_broken_images_are_left_out_and_named(embedder, own_photographs, tmp_path):
    folder = own_photographs / "camera 0"
    (folder / "img0.jpg").write_bytes(b"")
    (folder / "img2.jpg").write_bytes((folder / "img2.jpg").read_bytes()[:80])
    (folder / "text.png").write_text("no picture")
    images = list_images([own_photographs])
    made = extract(embedder, images, tmp_path / "out")
    bad = {str(folder / name) for name in ("img0.jpg", "img2.jpg", "text.png")}
    assert len(made) == 9 and len(made.skipped) == 3
    assert all(any(path in line for line in made.skipped) for path in bad)
    assert not bad & set(made.images.paths)
    np.testing.assert_allclose(made.embeddings, embedder(list(made.images.paths)), atol=1e-6)
    with pytest.raises(DataError, match=r"img0\.jpg is empty.*--strict"):
        extract(embedder, images, tmp_path / "strict", strict=True)


def test_nothing_readable_is_an_error(embedder, tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"")
    images = list_images([tmp_path])
    with pytest.raises(DataError, match=r"none of 2 images can be read: .*a\.jpg"):
        extract(embedder, images, tmp_path / "out")
    (tmp_path / "table.csv").write_text("path\ngone.jpg\n")
    with pytest.raises(DataError, match=r"gone\.jpg does not exist"):
        extract(embedder, list_images([tmp_path / "table.csv"]), tmp_path / "out2")


def test_folders_of_something_else_are_left_alone(embedder, photographs, tmp_path):
    images = list_images([photographs])
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(DataError, match="holds other files"):
        extract(embedder, images, tmp_path)
    with pytest.raises(ConfigError, match="workers is -1"):
        extract(embedder, images, tmp_path / "out", workers=-1)
    with pytest.raises(ConfigError, match="shard_size is 0"):
        extract(embedder, images, tmp_path / "out", shard_size=0)
    with pytest.raises(DataError, match="is not a folder of embeddings"):
        open_extraction(tmp_path)


def test_a_folder_called_unfinished_that_is_not_ours_is_left_alone(embedder, photographs, tmp_path):
    images, mine = list_images([photographs]), tmp_path / "unfinished" / "novel.txt"
    mine.parent.mkdir()
    mine.write_text("chapter 1")
    with pytest.raises(DataError, match="holds other files"):
        extract(embedder, images, tmp_path)
    assert len(extract(embedder, images, tmp_path, overwrite=True)) == 11
    assert mine.read_text() == "chapter 1"
    assert [path.name for path in mine.parent.iterdir()] == ["novel.txt"]


def test_what_a_killed_process_leaves_is_no_hindrance(embedder, photographs, tmp_path, monkeypatch):
    images, out = list_images([photographs]), tmp_path / "out"
    # While it began.
    (out / "unfinished").mkdir(parents=True)
    (out / ".lock").touch()
    (out / "unfinished" / ".plan.x1y2.json").touch()
    interrupt(embedder, images, out, monkeypatch)
    # While it wrote a shard, and while it finished.
    (out / "unfinished" / ".000000000008.x1y2.safetensors").touch()
    (out / ".embeddings.x1y2.npy").touch()
    made = extract(embedder, images, out)
    assert {path.name for path in out.iterdir()} == {
        "embeddings.json", "embeddings.npy", "images.csv",
    }  # fmt: skip
    np.testing.assert_allclose(made.embeddings, embedder(list(images.paths)), atol=1e-6)


def test_damage_is_told(embedder, photographs, tmp_path):
    made = extract(embedder, list_images([photographs]), tmp_path / "out")

    def damaged(name, change):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(made.root, copy)
        change(copy / name)
        with pytest.raises(DataError) as error:
            open_extraction(copy)
        return str(error.value)

    def flip_last_bit(path):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    assert "sha256 differs" in damaged("embeddings.npy", flip_last_bit)
    assert "is missing" in damaged("images.csv", lambda path: path.unlink())
    assert "bytes" in damaged("images.csv", lambda path: path.write_text("path\n"))
    assert "format" in damaged(
        "embeddings.json",
        lambda path: path.write_text(
            json.dumps({**json.loads(path.read_text()), "format": "gsalign-embeddings-9"})
        ),
    )
    assert "does not belong there" in damaged(
        "embeddings.json",
        lambda path: path.write_text(path.read_text().replace('"images.csv": {', '"../x": {')),
    )


def test_a_full_disk_is_told(checkpoint, photographs, tmp_path):
    """Files that may have 600 bytes at most fail as a full disk does; in a process of its own."""
    out = tmp_path / "out"
    code = """
import resource, sys
from gsalign.cli.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
sys.exit(main(sys.argv[1:]))
"""
    arguments = ["extract", photographs, "--checkpoint", checkpoint, "--out", out, "--workers", "0"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-2000:]
    assert "I/O error" in done.stderr and done.stderr.count("\n") == 1
    assert not list(out.rglob("*.safetensors"))
