"""Images of one's own: tables and folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from cargo_folder import write_image

from gsalign.data import (
    AERIAL,
    GROUND,
    VIEW_PROTOCOLS,
    hold_out_identities,
    load_folder,
    load_table,
    read_images,
    read_table,
)
from gsalign.data.folder import camera_and_view
from gsalign.data.labels import number_names
from gsalign.errors import DataError


def table(tmp_path: Path, text: str, name: str = "people.csv", images: int = 6) -> Path:
    for number in range(images):
        write_image(tmp_path / "images" / f"{number}.jpg", number)
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_texts_are_numbered_and_numbers_stay():
    assert number_names(["17", "3", "17"]) == {"17": 17, "3": 3}
    assert number_names(["zoë", "anna", "7"]) == {"7": 0, "anna": 1, "zoë": 2}
    assert number_names(["0002", "0010"]) == {"0002": 0, "0010": 1}
    assert number_names([str(2**63)]) == {str(2**63): 0}
    assert number_names(["²"]) == {"²": 0}


def test_a_table(tmp_path):
    path = table(
        tmp_path,
        "\ufeffPath, identity ,camera,view,note\n"
        "images/0.jpg,anna,roof,aerial,x\n"
        "images/1.jpg,anna,gate,ground,\n"
        '"images/2.jpg",zoë,,1,"a, b"\n'
        "\n"
        "images/3.jpg,,gate,,\n"
        f"{tmp_path}/images/4.jpg,-1,,ground,\n",
    )
    records = [row.record for row in read_table(path)]
    assert [record.path for record in records] == [
        tmp_path / "images" / f"{i}.jpg" for i in range(5)
    ]
    assert [record.identity for record in records] == [0, 0, 1, -1, -1]
    assert [record.identity_name for record in records] == ["anna", "anna", "zoë", "", ""]
    assert [record.camera_name for record in records] == ["roof", "gate", "", "gate", ""]
    assert [record.view for record in records] == [AERIAL, GROUND, AERIAL, GROUND, GROUND]
    unknown = [record.camera for record in records if not record.camera_name]
    assert len(set(unknown)) == 2 and max(unknown) < 0
    split = read_images(path)
    assert split.num_identities == 2 and split.num_cameras == 2
    assert list(split.records) == records


def test_a_table_as_a_data_set(tmp_path):
    lines = [f"images/{i}.jpg\t{i % 2}\t{split}"
             for i, split in enumerate(["train"] * 4 + ["query", "gallery"])]  # fmt: skip
    path = table(tmp_path, "\n".join(["path\tidentity\tsplit", *lines]), "people.tsv")
    dataset = load_table(path)
    assert [len(split) for split in dataset.splits] == [4, 1, 1]
    assert dataset.root == tmp_path and dataset.protocols == ("all",)
    lines[0] = "images/0.jpg\t0\t"
    path.write_text("\n".join(["path\tidentity\tsplit", *lines]))
    with pytest.raises(DataError, match=r"0\.jpg has no split"):
        load_table(path)
    lines[0] = "images/0.jpg\t\ttrain"
    path.write_text("\n".join(["path\tidentity\tsplit", *lines]))
    with pytest.raises(DataError, match=r"0\.jpg of train has no identity"):
        load_table(path)
    with pytest.raises(DataError, match=r"is no .csv or .tsv file. Expected"):
        load_table(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no column path and identity; its first line is empty"),
        ("path,camera\n", "has no column identity; its first line is path, camera"),
        ("path,identity\n", "has no rows"),
        ("path,Identity,identity\n", "names a column twice: path, Identity, identity"),
        ("path,identity\nimages/0.jpg,a,b\n", "line 2: 3 cells, the first line has 2"),
        ("path,identity\nimages/0.jpg,a\nimages/9.jpg,b\n", "line 3: images/9.jpg does not exist"),
        ("path,identity\nimages/0.jpg,a\nimages/0.jpg,b\n", "line 3: .* is in line 2 already"),
        ("path,identity\nimages/0.txt,a\n", "line 2: images/0.txt is no .jpg"),
        ("path,identity\n,a\n", "line 2: no path"),
        ("path,identity,view\nimages/0.jpg,a,side\n", "view is 'side'; wanted aerial or ground"),
        ("path,identity,split\nimages/0.jpg,a,test\n", "split is 'test'; wanted train, query"),
        ('path,identity\n"images/0.jpg,a\n', "cannot be read as text in UTF-8"),
    ],
)
def test_a_wrong_table_is_told_by_its_line(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_table(table(tmp_path, text, images=1))


def test_tables_that_are_none(tmp_path):
    (tmp_path / "latin.csv").write_bytes("path,identity\né.jpg,a\n".encode("latin-1"))
    for name, message in (
        ("latin.csv", "cannot be read as text in UTF-8"),
        ("none.csv", "does not exist"),
        ("none", "does not exist; give a folder"),
    ):
        with pytest.raises(DataError, match=message):
            read_images(tmp_path / name)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match="no folder and no"):
        read_images(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("name", "camera", "view"),
    [
        ("cam3_drone_000017.jpg", 3, AERIAL),
        ("0002_c1s1_000451_03.jpg", 1, GROUND),
        ("Camera12-17.JPG", 12, GROUND),
        ("anna c5 UAV.png", 5, AERIAL),
        ("17.jpg", None, GROUND),
        ("campus_c.jpg", None, GROUND),
        ("c٣.jpg", None, GROUND),
    ],
)
def test_camera_and_view_of_a_name(name, camera, view):
    assert camera_and_view(name) == (camera, view)


@pytest.fixture
def own(tmp_path):
    """Folders whose names have blanks and letters of other scripts."""
    root = tmp_path / "my set"
    for split, people in {
        "train": {"Łukasz K": ["c1_1.jpg", "c2 drone.jpg"], "anna": ["a.jpg", "b.jpg"]},
        "query": {"李明": ["c1_1.jpg", "c2_drone_1.jpg"]},
        "gallery": {"李明": ["c2_drone_2.jpg", "c1_2.jpg"], "дым": ["later/c1_1.jpg"]},
    }.items():
        for person, names in people.items():
            for number, name in enumerate(names):
                write_image(root / split / person / name, number)
    write_image(root / "train" / ".thumbs" / "x.jpg", 1)
    return root


def test_a_folder_as_a_data_set(own):
    dataset = load_folder(own)
    assert [len(split) for split in dataset.splits] == [4, 2, 3]
    assert dataset.protocols == VIEW_PROTOCOLS
    names = {record.identity_name for split in dataset.splits for record in split.records}
    assert names == {"Łukasz K", "anna", "李明", "дым"}
    (number,) = set(dataset.query.identities.tolist())
    assert (dataset.gallery.identities == number).sum() == 2
    assert dataset.query.cameras.tolist() == [1, 2]
    write_image(own / "query" / "loose.jpg", 1)
    assert "query/loose.jpg (in no folder of an identity)" in load_folder(own).notes[0]


def test_images_without_a_camera_are_never_left_out(own):
    for split in ("query", "gallery"):
        write_image(own / split / "eva" / "x.jpg", 1)
    dataset = load_folder(own)
    cameras = [r.camera for split in dataset.splits for r in split.records if not r.camera_name]
    assert len(cameras) == len(set(cameras)) == 4 and max(cameras) < 0
    assert dataset.train.num_cameras == 2


def test_identities_without_cameras_can_be_held_out(tmp_path):
    for split, people in {"train": "abcdef", "query": "xy", "gallery": "xy"}.items():
        for person in people:
            for number in range(3):
                write_image(tmp_path / split / person / f"{number}.jpg", number)
    _, query, gallery = hold_out_identities(load_folder(tmp_path), 0.4)
    # Every image asks, and finds the others of its person, not itself.
    assert len(query) == len(gallery) == 6
    for record in query.records:
        same = [other for other in gallery.records if other.identity == record.identity]
        assert len(same) == 3
        assert [other for other in same if other.camera == record.camera] == [record]


def test_any_folder_of_images(own, tmp_path):
    split = read_images(own / "gallery", name="search")
    assert split.name == "search"
    assert [r.identity_name for r in split.records] == ["дым", "李明", "李明"]
    write_image(tmp_path / "flat" / "b.jpg", 1)
    write_image(tmp_path / "flat" / "a.png", 1)
    flat = read_images(tmp_path / "flat")
    assert [record.path.name for record in flat.records] == ["a.png", "b.jpg"]
    assert [record.identity for record in flat.records] == [-1, -1]
    assert flat.num_identities == 0
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images"):
        read_images(tmp_path / "empty")
