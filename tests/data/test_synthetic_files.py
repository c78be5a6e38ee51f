"""The generated set on disk: layout, reuse, and what an interrupted call leaves."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from gsalign.data.synthetic import (
    BODY_PARTS,
    PARTS,
    RENDERER_VERSION,
    SyntheticConfig,
    contact_sheet,
    generate,
    generation_settings,
    read_truth,
)
from gsalign.errors import DataError

SMALL = SyntheticConfig(
    seed=1,
    train_identities=2,
    test_identities=2,
    distractor_identities=1,
    images_per_identity_aerial=3,
    images_per_identity_ground=3,
    queries_per_identity=4,
    image_size=(64, 32),
    write_parts=True,
)
NAME = re.compile(r"Cam(\d+)_(day|night)_(\d+)_(\d+)\.jpg")


def _files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("synthetic") / "small"
    generate(root, SMALL)
    return root


def test_report_and_layout(tmp_path):
    seen: list[tuple[int, int]] = []
    root = tmp_path / "deep" / "set"
    report = generate(root, SMALL, progress=lambda done, total: seen.append((done, total)))
    assert (report.train_images, report.query_images, report.gallery_images) == (12, 8, 10)
    assert report.images == 30 and report.identities == 5 and not report.reused
    assert seen[-1] == (30, 30) and [d for d, _ in seen] == sorted(d for d, _ in seen)
    assert sorted(p.name for p in root.iterdir()) == [
        "gallery", "generated.json", "parts", "query", "train", "truth.csv",
    ]  # fmt: skip
    assert [p.name for p in root.parent.iterdir()] == ["set"]


def test_names(small):
    ids: set[int] = set()
    identities: dict[str, set[int]] = {"train": set(), "query": set(), "gallery": set()}
    views: dict[tuple[str, int], set[bool]] = {}
    for split in identities:
        for path in (small / split).rglob("*.jpg"):
            match = NAME.fullmatch(path.name)
            assert match is not None, path
            camera, identity, number = int(match[1]), int(match[3]), int(match[4])
            assert path.parent.name == f"Cam{camera}" and 1 <= camera <= 13
            assert number not in ids
            ids.add(number)
            identities[split].add(identity)
            views.setdefault((split, identity), set()).add(camera <= 5)
            with Image.open(path) as picture:
                assert picture.size == (32, 64) and picture.mode == "RGB"
    assert identities == {"train": {1, 2}, "query": {3, 4}, "gallery": {3, 4, 5}}
    assert all(views["query", i] == {True, False} for i in (3, 4))
    assert all(views["gallery", i] == {True, False} for i in (3, 4, 5))


def test_truth_table(small):
    rows = read_truth(small)
    on_disk = {p.relative_to(small).as_posix() for s in ("train", "query", "gallery")
               for p in (small / s).rglob("*.jpg")}  # fmt: skip
    assert {row.path for row in rows} == on_disk and len(rows) == 30
    for row in rows:
        match = NAME.fullmatch(row.path.split("/")[-1])
        assert match is not None
        assert (row.camera, row.time, row.identity) == (int(match[1]), match[2], int(match[3]))
        assert set(row.visible) == set(BODY_PARTS)


def test_part_maps_mirror_the_layout(small):
    rows = read_truth(small)
    for row in rows:
        with Image.open((small / "parts" / row.path).with_suffix(".png")) as picture:
            assert picture.size == (32, 64) and picture.mode == "L"
            labels = np.asarray(picture)
        assert labels.max() < len(PARTS)
        assert (labels > 0).mean() > 0.03


def test_pictures_do_not_depend_on_the_workers(small, tmp_path):
    root = tmp_path / "workers"
    generate(root, SMALL, workers=2)
    expected, found = _files(small), _files(root)
    assert found == expected


def test_same_settings_are_reused(small):
    before = {p: p.stat().st_mtime_ns for p in small.rglob("*")}
    report = generate(small, SMALL, overwrite=True)
    assert report.reused and report.images == 30
    assert {p: p.stat().st_mtime_ns for p in small.rglob("*")} == before


def test_other_settings_need_overwrite(tmp_path):
    root = tmp_path / "set"
    other = SMALL.model_copy(update={"seed": 2, "write_parts": False})
    generate(root, SMALL)
    before = _files(root)
    with pytest.raises(DataError, match="overwrite"):
        generate(root, other)
    assert _files(root) == before
    report = generate(root, other, overwrite=True)
    assert not report.reused
    assert not (root / "parts").exists()
    assert generation_settings(root)["fingerprint"] == other.fingerprint()
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("marker", [None, "{}", "not json", "[]"])
def test_foreign_folders_are_never_replaced(tmp_path, marker):
    root = tmp_path / "set"
    root.mkdir()
    (root / "thesis.txt").write_text("years of work")
    if marker is not None:
        (root / "generated.json").write_text(marker)
    with pytest.raises(DataError, match="not made by the generator"):
        generate(root, SMALL, overwrite=True)
    assert (root / "thesis.txt").read_text() == "years of work"


def test_a_file_is_never_replaced(tmp_path):
    root = tmp_path / "set"
    root.write_text("a file")
    with pytest.raises(DataError, match="is a file"):
        generate(root, SMALL, overwrite=True)
    assert root.read_text() == "a file"


def test_an_empty_folder_is_filled(tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    assert generate(root, SMALL).images == 30
    assert (root / "truth.csv").is_file()


def test_a_link_to_a_set_stays_a_link(tmp_path):
    (tmp_path / "store").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "store", target_is_directory=True)
    generate(link, SMALL)
    generate(link, SMALL.model_copy(update={"seed": 9}), overwrite=True)
    assert link.is_symlink() and (tmp_path / "store" / "truth.csv").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "store"]


@pytest.mark.parametrize("rename", [1, 2])
def test_interrupted_renaming_keeps_the_old_set(tmp_path, monkeypatch, rename):
    root = tmp_path / "set"
    generate(root, SMALL)
    before = _files(root)
    real, calls = os.replace, []

    def replace(source, target):
        if Path(source) == root or Path(target) == root:
            calls.append(source)
            if len(calls) == rename:
                raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        generate(root, SMALL.model_copy(update={"seed": 5}), overwrite=True)
    assert _files(root) == before
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("workers", [0, 2])
def test_interruption_leaves_nothing(tmp_path, workers):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    root = tmp_path / "set"
    with pytest.raises(KeyboardInterrupt):
        generate(root, SMALL, workers=workers, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_interruption_keeps_the_old_set(tmp_path):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    root = tmp_path / "set"
    generate(root, SMALL)
    before = _files(root)
    with pytest.raises(KeyboardInterrupt):
        generate(root, SMALL.model_copy(update={"seed": 5}), overwrite=True, progress=interrupt)
    assert _files(root) == before
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_contact_sheet(small, tmp_path):
    path = tmp_path / "sheet.png"
    contact_sheet(small, path, identities=3)
    with Image.open(path) as picture:
        assert picture.size == (12 * 36 - 4, 3 * 68 - 4)
        assert np.asarray(picture).std() > 20


def test_read_truth_names_what_is_wrong(tmp_path, small):
    with pytest.raises(DataError, match=r"truth\.csv"):
        read_truth(tmp_path)
    (tmp_path / "truth.csv").write_text("path,identity\n")
    with pytest.raises(DataError, match="columns"):
        read_truth(tmp_path)
    lines = (small / "truth.csv").read_text().splitlines()
    (tmp_path / "truth.csv").write_text(lines[0] + "\n" + lines[1].replace(",1,", ",x,", 1) + "\n")
    with pytest.raises(DataError, match="line 2"):
        read_truth(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries_per_identity": 3}, "even"),
        ({"queries_per_identity": 6}, "gallery"),
        ({"image_size": (64, 8)}, "image_size"),
        ({"image_size": (64, 80)}, "image_size"),
        ({"night_share": 1.5}, "night_share"),
        ({"aerial_roll": 181.0}, "aerial_roll"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_config_refuses(changes, message):
    values = {**SMALL.model_dump(), **changes}
    with pytest.raises(ValidationError, match=message):
        SyntheticConfig(**values)


def test_fingerprint_follows_the_settings():
    assert SMALL.fingerprint() == SyntheticConfig(**SMALL.model_dump()).fingerprint()
    assert SMALL.fingerprint() != SMALL.model_copy(update={"night_share": 0.2}).fingerprint()


def test_a_full_circle_keeps_the_fingerprint_it_had():
    # Sets of before the setting are on people's disks.
    before = SMALL.model_dump(mode="json", exclude={"aerial_roll"})
    text = json.dumps({"renderer_version": RENDERER_VERSION, **before}, sort_keys=True)
    assert SMALL.fingerprint() == hashlib.sha256(text.encode()).hexdigest()
    assert SMALL.fingerprint() != SMALL.model_copy(update={"aerial_roll": 0.0}).fingerprint()


def test_renderer_version_is_part_of_the_fingerprint(monkeypatch, small):
    before = SMALL.fingerprint()
    monkeypatch.setattr("gsalign.data.synthetic.config.RENDERER_VERSION", -1)
    assert SMALL.fingerprint() != before
    with pytest.raises(DataError, match="renderer version"):
        generate(small, SMALL)
    assert json.loads((small / "generated.json").read_text())["fingerprint"] == before
