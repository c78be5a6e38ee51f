"""AG-ReID, AG-ReID.v2 and Market-1501: tiny folders of each layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cargo_folder import write_image

from gsalign.data import (
    AERIAL,
    DATASETS,
    GROUND,
    DataConfig,
    contiguous_labels,
    get_dataset_entry,
    guess_dataset,
    load_ag_reid,
    load_ag_reid_v2,
    load_dataset,
    load_market1501,
)
from gsalign.data.ag_reid import parse_name
from gsalign.data.ag_reid_v2 import EXPERIMENTS
from gsalign.errors import DataError

AG_REID_FILES = {
    "bounding_box_train": [
        f"P{p:04}T04041A0C{c}F{f}.jpg" for p in (1, 2) for c in (0, 3) for f in (31, 61)
    ],
    "query_all_c0": ["P0006T02140A0C0F91.jpg", "P0006T02140A1C0F91.jpg"],
    "bounding_box_test_all_c3": ["P0006T02140A0C3F691.jpg", "P0006T02140A1C3F691.jpg"],
    "query_all_c3": ["P0006T02140A0C3F751.jpg"],
    "bounding_box_test_all_c0": ["P0006T02140A0C0F31.jpg", "P0007T02140A0C0F31.jpg"],
}


def write(root: Path, files: dict[str, list[str]]) -> Path:
    for folder, names in files.items():
        for number, name in enumerate(names):
            write_image(root / folder / name, number)
    return root


@pytest.fixture
def ag_reid(tmp_path):
    return write(tmp_path / "AG-ReID", AG_REID_FILES)


@pytest.fixture
def ag_reid_v2(tmp_path):
    """One person in all three cameras, another in two; one image on no list."""
    root = tmp_path / "AG-ReID.v2"
    person, other = "P0001T04271A0", "P0002T04271A0"
    write(root, {f"train_all/P0009T04271A{a}": [f"P0009T04271A{a}C{c}F1.jpg" for c in (0, 2, 3)]
                 for a in (0, 1)})  # fmt: skip
    write(root, {f"query/{person}": [f"{person}C{c}F1.jpg" for c in (0, 2, 3)]})
    write(root, {f"query/{other}": [f"{other}C0F1.jpg", f"{other}C0F2.jpg"]})
    write(root, {f"gallery/{person}": [f"{person}C{c}F9.jpg" for c in (0, 2, 3)]})
    write(root, {f"gallery/{other}": [f"{other}C3F9.jpg"]})
    lines = {
        "aerial-to-cctv": ["query/{}C0F1", "query/{o}C0F1", "gallery/{}C3F9", "gallery/{o}C3F9"],
        "aerial-to-wearable": ["query/{}C0F1", "gallery/{}C2F9"],
        "cctv-to-aerial": ["query/{}C3F1", "gallery/{}C0F9"],
        "wearable-to-aerial": ["query/{}C2F1", "gallery/{}C0F9"],
    }
    places = (f"{person}/{person}", f"{other}/{other}")
    for protocol, names in lines.items():
        written = [f"{name.format(places[0], o=places[1])}.jpg" for name in names]
        (root / EXPERIMENTS[protocol]).write_text("\n".join(written) + "\n\n")
    return root


@pytest.fixture
def market(tmp_path):
    return write(
        tmp_path / "Market-1501-v15.09.15",
        {
            "bounding_box_train": [f"0002_c{c}s1_000451_0{n}.jpg" for c in (1, 2) for n in (1, 2)],
            "query": ["0003_c1s1_000001_00.jpg", "0004_c2s1_000001_00.jpg"],
            "bounding_box_test": [
                "-1_c1s1_000401_03.jpg", "-1_c2s1_000401_03.jpg", "0000_c1s1_000151_01.jpg",
                "0003_c2s3_000151_01.jpg", "0004_c6s3_000151_01.jpg",
            ],
        },
    )  # fmt: skip


def test_an_identity_of_ag_reid_has_ten_digits():
    record = parse_name(Path("P0006T02140A0C0F1831.jpg"))
    assert (record.identity, record.identity_name) == (6021400, "0006021400")
    assert (record.camera, record.view, record.index) == (0, AERIAL, 1831)
    assert parse_name(Path("P9999T99999A9C3F1.jpg")).identity == 9_999_999_999 > 2**32
    assert parse_name(Path("P0001T04271A0C2F1.jpg")).view == GROUND
    assert parse_name(Path("P0001T04271A0C3F1.jpg")).view == GROUND


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("P0006T02140A0C1F1831.jpg", "camera 1 is none of 0, 2, 3"),
        ("P0006T02140C0F1831.jpg", "not of the form"),
        ("P0006T02140A0C0F1831.jpg.part", "not of the form"),
        (f"P{'9' * 15}T02140A0C0F1.jpg", "more than 18 digits"),
    ],
)
def test_other_names_are_none_of_ag_reid(name, why):
    with pytest.raises(ValueError, match=why):
        parse_name(Path(name))


def test_ag_reid(ag_reid):
    dataset = load_ag_reid(ag_reid)
    assert [len(split) for split in dataset.splits] == [8, 3, 4]
    assert dataset.train.num_identities == 2
    assert dataset.query.num_identities == 2  # A0 and A1 of the same P and T are two people
    assert dataset.protocols == ("aerial-to-ground", "ground-to-aerial")
    for split in (dataset.query, dataset.gallery):
        for record in split.records:
            assert record.path.is_file()
            assert record.path.parent.name.endswith("c0") == (record.view == AERIAL)
    assert dataset.notes == ()


def test_large_identities_stay_apart(tmp_path):
    # Both are the same in 32 bits.
    low, high = 1_000_000_000, 1_000_000_000 + 2**32
    names = [
        f"P{i:010}"[:5] + f"T{i:010}"[:1] + f"{i:010}"[4:9] + f"A{i % 10}" for i in (low, high)
    ]
    records = [parse_name(Path(f"{name}C0F1.jpg")) for name in names]
    assert [record.identity for record in records] == [low, high]
    labels, classes = contiguous_labels(np.array([record.identity for record in records]))
    assert labels.tolist() == [0, 1] and classes.tolist() == [low, high]


def test_an_image_in_the_folder_of_the_other_camera_is_left_out_and_named(ag_reid):
    write_image(ag_reid / "query_all_c0" / "P0006T02140A0C3F5.jpg", 1)
    dataset = load_ag_reid(ag_reid)
    assert len(dataset.query) == 3
    assert (
        "query_all_c0/P0006T02140A0C3F5.jpg (camera 3 in folder query_all_c0)" in dataset.notes[0]
    )
    with pytest.raises(DataError, match="at most 0 are allowed"):
        load_ag_reid(ag_reid, max_bad_names=0)


def test_ag_reid_v2_takes_what_the_lists_name(ag_reid_v2):
    dataset = load_ag_reid_v2(ag_reid_v2)
    assert dataset.protocols == tuple(EXPERIMENTS)
    assert [len(split) for split in dataset.splits] == [6, 4, 4]
    assert dataset.ignored == {"query": 1}
    assert dataset.notes == ("1 images of query are on the list of no experiment; left out",)
    assert dataset.query.lists["aerial-to-cctv"].tolist() == [True, False, False, True]
    assert dataset.query.lists["cctv-to-aerial"].tolist() == [False, False, True, False]
    assert dataset.gallery.lists["wearable-to-aerial"].tolist() == [True, False, False, False]
    first = dataset.query.records[0]
    assert first.lists == ("aerial-to-cctv", "aerial-to-wearable")


def test_names_on_a_list_that_are_not_there_are_told(ag_reid_v2):
    path = ag_reid_v2 / EXPERIMENTS["aerial-to-cctv"]
    path.write_text(path.read_text() + "gallery/P0001T04271A0/P0001T04271A0C3F10.jpg\nnonsense\n")
    note = load_ag_reid_v2(ag_reid_v2).notes[0]
    assert "gallery/P0001T04271A0/P0001T04271A0C3F10.jpg (on a list, but not there)" in note
    assert "exp1_aerial_to_cctv.txt, line 7 (nonsense)" in note
    path.write_text("../../etc/passwd\n/query/a.jpg\n")
    with pytest.raises(DataError, match=r"exp1_aerial_to_cctv.txt names no image: line 1 .*line 2"):
        load_ag_reid_v2(ag_reid_v2)
    path.unlink()
    with pytest.raises(DataError, match=r"has no file exp1_aerial_to_cctv.txt. Expected"):
        load_ag_reid_v2(ag_reid_v2)


def test_market_drops_junk_and_keeps_distractors(market):
    dataset = load_market1501(market)
    assert [len(split) for split in dataset.splits] == [4, 2, 3]
    assert dataset.ignored == {"gallery": 2}
    assert sorted(dataset.gallery.identities.tolist()) == [0, 3, 4]
    assert [record.identity_name for record in dataset.query.records] == ["0003", "0004"]
    assert dataset.protocols == ("all",)
    assert set(dataset.gallery.views.tolist()) == {GROUND}
    write_image(market / "query" / "0000_c1s1_000001_00.jpg", 1)
    write_image(market / "query" / "0005_c7s1_000001_00.jpg", 1)
    note = load_market1501(market).notes[0]
    assert "0000_c1s1_000001_00.jpg (junk or a distractor outside" in note
    assert "0005_c7s1_000001_00.jpg (camera 7 is not in 1..6)" in note


@pytest.mark.parametrize("name", ["ag_reid", "ag_reid_v2", "market"])
def test_missing_folders_show_the_layout(name, request):
    root = request.getfixturevalue(name)
    layout = DATASETS[{"market": "market1501"}.get(name, name)].layout
    assert guess_dataset(root) == layout.name
    (root / layout.folders[1]).rename(root / "elsewhere")
    config = DataConfig(name=layout.name, root=root)
    with pytest.raises(DataError) as caught:
        load_dataset(config)
    assert f"has no folder {layout.folders[1]}. Expected" in str(caught.value)
    assert layout.picture in str(caught.value)
    # What is left still says which set it was.
    assert guess_dataset(root) == layout.name


def test_every_name_is_registered():
    assert set(DATASETS) == set(DataConfig.model_fields["name"].annotation.__args__)
    assert all(name == entry.layout.name for name, entry in DATASETS.items())
    with pytest.raises(DataError, match="'duke' is unknown; there are cargo, ag_reid"):
        get_dataset_entry("duke")


def test_cargo_is_told_from_folders_of_ones_own(cargo, tmp_path):
    assert guess_dataset(cargo) == "cargo"
    for split in ("train", "query", "gallery"):
        write_image(tmp_path / "own" / split / "Camila" / "1.jpg", 1)
    assert guess_dataset(tmp_path / "own") == "folder"
    assert guess_dataset(tmp_path / "people.csv") == "table"
    assert guess_dataset(tmp_path / "nowhere") == "cargo"
    (tmp_path / "other" / "photos").mkdir(parents=True)
    for wrong in (tmp_path / "other", tmp_path / "own" / "train" / "Camila" / "1.jpg"):
        with pytest.raises(DataError, match="laid out like no data set known"):
            guess_dataset(wrong)
