"""Packed files: the same pixels, made once, made anew when a file changes, refused when damaged."""

from __future__ import annotations

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import gsalign.data.packed as packed
from gsalign.data import DataConfig, ImageStore, load_cargo, load_dataset, train_loader
from gsalign.errors import DataError

SIZE = (32, 16)


@pytest.fixture
def paths(cargo: Path) -> tuple[Path, ...]:
    return load_cargo(cargo).query.paths


def store(paths, folder: Path) -> ImageStore:
    return ImageStore(paths, SIZE, cache="packed", folder=folder, name="query")


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.npy"))


def test_the_pixels_are_those_of_the_files_and_are_decoded_once(paths, tmp_path, monkeypatch):
    plain = ImageStore(paths, SIZE)
    first = store(paths, tmp_path)
    assert all(torch.equal(first[i], plain[i]) for i in range(len(paths)))
    monkeypatch.setattr(packed, "read_image", None)
    again = store(paths, tmp_path)
    assert torch.equal(again[1], plain[1])
    again[1].zero_()  # a copy: the file stays
    assert torch.equal(again[1], plain[1])
    assert torch.equal(pickle.loads(pickle.dumps(again))[1], plain[1])
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("change", ["time", "length"])
def test_what_is_out_of_date_is_made_anew_and_removed(paths, tmp_path, change):
    store(paths, tmp_path)
    before = files(tmp_path)
    if change == "time":
        os.utime(paths[0], ns=(1, 1))
    else:
        status = paths[0].stat()
        paths[0].write_bytes(paths[0].read_bytes() + b"\0")
        os.utime(paths[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    new = store(paths, tmp_path)
    assert len(files(tmp_path)) == 1 and files(tmp_path) != before
    assert torch.equal(new[0], ImageStore(paths, SIZE)[0])


def test_other_files_and_other_sizes_have_files_of_their_own(paths, tmp_path):
    store(paths, tmp_path)
    fewer = store(paths[1:], tmp_path)
    ImageStore(paths, (16, 8), cache="packed", folder=tmp_path, name="query")
    assert len(files(tmp_path)) == 3
    assert torch.equal(fewer[0], ImageStore(paths, SIZE)[1])


def test_many_ask_and_one_makes_it(paths, tmp_path, monkeypatch):
    made = []
    write = packed._write
    monkeypatch.setattr(packed, "_write", lambda *a: (made.append(a), write(*a)))
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: store(paths, tmp_path), range(4)))
    assert len(made) == 1
    assert all(torch.equal(s[0], stores[0][0]) for s in stores)


def test_a_broken_image_is_told_when_it_is_asked_for(paths, tmp_path):
    paths[1].write_bytes(b"no image")
    kept = store(paths, tmp_path)
    assert torch.equal(kept[0], ImageStore(paths, SIZE)[0])
    with pytest.raises(DataError, match=str(paths[1])):
        kept[1]


@pytest.mark.parametrize("place", ["gsalign.data.packed.open_memmap", "os.posix_fallocate"])
def test_a_write_that_fails_leaves_nothing(paths, tmp_path, monkeypatch, place):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(place, full)
    with pytest.raises(DataError, match=r"No space left.*data.cache_folder"):
        store(paths, tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"]


def test_what_a_killed_process_left_is_removed(paths, tmp_path):
    store(paths, tmp_path)
    (file,) = tmp_path.glob("*.npy")
    left = tmp_path / f".{file.stem}.abcd1234.npy"
    file.rename(left)
    other = tmp_path / ".other-32x16-0123456789ab-0123456789ab.abcd1234.npy"
    other.touch()
    store(paths, tmp_path)
    assert not left.exists() and file.exists() and other.exists()


@pytest.mark.parametrize("keep", [0, 3, 60, 1000, -1])
def test_a_file_that_was_cut_off_is_refused(paths, tmp_path, keep):
    store(paths, tmp_path)
    (file,) = tmp_path.glob("*.npy")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"is damaged, wanted uint8 .*remove it"):
        store(paths, tmp_path)


def test_a_file_that_may_not_be_read_is_told(paths, tmp_path, monkeypatch):
    store(paths, tmp_path)

    def refused(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(packed, "open_memmap", refused)
    with pytest.raises(DataError, match=r"\.npy cannot be read: Permission denied"):
        store(paths, tmp_path)


def test_too_little_space_and_damaged_files_are_refused(paths, tmp_path, monkeypatch):
    store(paths, tmp_path)
    (file,) = tmp_path.glob("*.npy")
    np.save(file, np.zeros((2, 3), dtype=np.uint8))
    with pytest.raises(DataError, match=r"is damaged, wanted uint8 .*remove it"):
        store(paths, tmp_path)
    np.save(file, np.array([{}]), allow_pickle=True)
    with pytest.raises(DataError, match="remove it"):
        store(paths, tmp_path)
    monkeypatch.setattr(packed.shutil, "disk_usage", lambda _: Usage())
    with pytest.raises(DataError, match=r"GiB are free; set data.cache_folder"):
        store(paths, tmp_path / "other")


class Usage:
    free = 0


def test_training_batches_are_the_same_with_workers(cargo, tmp_path):
    config = DataConfig(
        root=cargo, image_size=SIZE, identities_per_batch=2, images_per_identity=2, num_workers=0
    )
    split = load_cargo(cargo).train
    changed = config.model_copy(
        update={"cache": "packed", "cache_folder": tmp_path, "num_workers": 2}
    )
    pairs = zip(train_loader(split, config), train_loader(split, changed), strict=True)
    assert all(torch.equal(a.images, b.images) for a, b in pairs)
    assert config.packed_folder == cargo / "packed" and changed.packed_folder == tmp_path


def test_packed_files_of_a_table_lie_beside_it(cargo, tmp_path):
    people = load_cargo(cargo)
    rows = [
        f"{r.path},{r.identity},{r.camera},{r.view},{split.name}"
        for split in (people.train, people.query, people.gallery)
        for r in split.records
    ]
    table = tmp_path / "people.csv"
    table.write_text("\n".join(["path,identity,camera,view,split", *rows]))
    config = DataConfig(
        name="table",
        root=table,
        image_size=SIZE,
        identities_per_batch=2,
        images_per_identity=2,
        num_workers=0,
        cache="packed",
    )
    next(iter(train_loader(load_dataset(config).train, config)))
    assert len(files(tmp_path / "packed")) == 1
