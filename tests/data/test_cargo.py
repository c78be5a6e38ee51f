from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from cargo_folder import write_image, write_split
from rich.console import Console

from gsalign.data import (
    AERIAL,
    GROUND,
    ReIDDataset,
    Split,
    check_images,
    contiguous_labels,
    dataset_statistics,
    hold_out_identities,
    load_cargo,
    statistics_table,
)
from gsalign.data.cargo import parse_name
from gsalign.errors import DataError


def test_a_name_says_camera_time_identity_and_index():
    record = parse_name("Cam2_day_2519_320.jpg")
    assert (record.camera, record.time, record.identity, record.index) == (2, "day", 2519, 320)
    assert record.view == AERIAL


@pytest.mark.parametrize(("camera", "view"), [(1, AERIAL), (5, AERIAL), (6, GROUND), (13, GROUND)])
def test_cameras_up_to_five_are_aerial(camera, view):
    assert parse_name(f"Cam{camera}_night_7_1.jpg").view == view


@pytest.mark.parametrize(
    "name",
    [
        "0001_c1s1_000151_00.jpg",
        "Cam0_day_1_1.jpg",
        "Cam14_day_1_1.jpg",
        "Cam2_dusk_1_1.jpg",
        "Cam2_day_1.jpg",
        "Cam2_day_-1_3.jpg",
        "Cam2_day_1_3.jpg.part",
        "Cam\u0662_day_1_3.jpg",
    ],
)
def test_other_names_do_not_parse(name):
    with pytest.raises(ValueError, match=r"not|neither"):
        parse_name(name)


def test_the_records_of_a_folder(cargo):
    dataset = load_cargo(cargo)
    assert dataset.name == "cargo"
    assert dataset.root == cargo
    assert dataset.notes == ()
    assert [len(split) for split in dataset.splits] == [40, 6, 15]
    assert dataset.train.num_identities == 8
    assert dataset.gallery.num_cameras == 4
    assert dataset.train.identities.dtype == np.int64
    for split in dataset.splits:
        for record, identity, camera, view in zip(
            split.records, split.identities, split.cameras, split.views, strict=True
        ):
            assert record.path.is_file()
            assert record.path.parent.name == f"Cam{camera}"
            assert f"_{identity}_" in record.path.name
            assert view == (camera <= 5)


def test_the_order_is_by_camera_then_name_whatever_the_file_system_says(cargo):
    records = load_cargo(cargo).gallery.records
    keys = [(record.camera, record.path.name) for record in records]
    assert keys == sorted(keys)
    assert keys[-1][0] == 13  # by number: as text Cam13 comes before Cam2


def test_arrays_cannot_be_changed_by_accident(cargo):
    with pytest.raises(ValueError, match="read-only"):
        load_cargo(cargo).train.identities[0] = 1


def test_hidden_files_and_other_files_are_passed_over(cargo):
    (cargo / "train" / "Cam1" / "._Cam1_day_10_1.jpg").write_bytes(b"x")
    (cargo / "train" / "Cam1" / "Thumbs.db").write_bytes(b"x")
    (cargo / "train" / "readme.txt").write_text("x")
    dataset = load_cargo(cargo)
    assert len(dataset.train) == 40
    assert dataset.notes == ()


def test_a_missing_root_says_what_is_expected_and_how_to_make_it(tmp_path):
    with pytest.raises(DataError) as caught:
        load_cargo(tmp_path / "nowhere")
    message = str(caught.value)
    assert "nowhere" in message
    assert "does not exist" in message
    assert "gallery/ Cam1/ ... Cam13/" in message
    assert f"gsalign data generate --out {tmp_path / 'nowhere'}" in message


def test_a_missing_folder_is_named(cargo):
    (cargo / "query").rename(cargo / "probe")
    with pytest.raises(DataError, match="has no folder query"):
        load_cargo(cargo)


def test_an_empty_split_is_an_error(cargo):
    for file in (cargo / "query").rglob("*.jpg"):
        file.unlink()
    with pytest.raises(DataError, match=r"no images in .*query"):
        load_cargo(cargo)


def test_names_that_do_not_parse_are_counted_and_named(cargo, caplog):
    write_image(cargo / "train" / "Cam1" / "person.jpg", 1)
    write_image(cargo / "gallery" / "Cam2" / "Cam3_day_101_9.jpg", 1)
    with caplog.at_level(logging.WARNING):
        dataset = load_cargo(cargo)
    assert len(dataset.train) == 40
    assert len(dataset.gallery) == 15
    (note,) = dataset.notes
    assert note in caplog.text
    assert note.startswith("2 image name(s)")
    assert "train/Cam1/person.jpg" in note
    assert "gallery/Cam2/Cam3_day_101_9.jpg (camera 3 in folder Cam2)" in note


def test_too_many_such_names_are_an_error(cargo):
    for i in range(7):
        write_image(cargo / "train" / "Cam1" / f"person{i}.jpg", 1)
    with pytest.raises(DataError, match=r"^7 image name.*and 2 more; at most 6 are allowed"):
        load_cargo(cargo, max_bad_names=6)
    assert len(load_cargo(cargo, max_bad_names=7).train) == 40


def test_identities_with_one_image(cargo):
    write_split(cargo, "train", {300: {3: 1}, 301: {8: 1}}, start=900)
    dropped = load_cargo(cargo)
    assert dropped.train.num_identities == 8
    (note,) = dropped.notes
    assert note.startswith("2 training identities have only one image")
    assert "300, 301" in note
    kept = load_cargo(cargo, singletons="keep")
    assert kept.train.num_identities == 10
    assert kept.notes == ()
    with pytest.raises(DataError, match=r"2 training identities.*300, 301"):
        load_cargo(cargo, singletons="error")
    with pytest.raises(DataError, match="singletons is 'ignore'"):
        load_cargo(cargo, singletons="ignore")


def test_a_training_set_of_nothing_but_singletons_is_an_error(cargo):
    for file in (cargo / "train").rglob("*.jpg"):
        file.unlink()
    write_split(cargo, "train", {1: {1: 1}, 2: {1: 1}})
    with pytest.raises(DataError, match="nothing is left to train on"):
        load_cargo(cargo)


def test_people_in_both_training_and_query_are_noted(cargo):
    write_split(cargo, "train", {101: {1: 2}}, start=900)
    (note,) = load_cargo(cargo).notes
    assert "1 identities of the query are in the training set too (101)" in note


def test_labels_are_contiguous_and_lead_back():
    raw = np.array([70, 10, 70, 2519, 10])
    labels, classes = contiguous_labels(raw)
    assert labels.tolist() == [1, 0, 1, 2, 0]
    assert classes.tolist() == [10, 70, 2519]
    assert np.array_equal(classes[labels], raw)


def test_statistics(cargo):
    train, query, gallery = dataset_statistics(load_cargo(cargo))
    assert (train.subset, train.identities, train.images, train.cameras) == ("train", 8, 40, 2)
    assert (train.aerial_images, train.ground_images) == (24, 16)
    assert train.night_images == sum(i % 3 == 0 for i in range(1, 41))
    assert (train.fewest_per_identity, train.most_per_identity) == (5, 5)
    assert (query.images, query.identities) == (6, 3)
    assert (gallery.images, gallery.cameras) == (15, 4)


def test_the_statistics_table_fits_a_terminal(cargo):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    console.print(statistics_table(dataset_statistics(load_cargo(cargo)), title="cargo"))
    text = console.export_text()
    for heading in ("subset", "# ids", "# images", "# cameras"):
        assert heading in text
    (line,) = [line for line in text.splitlines() if line.startswith("train")]
    assert line.split() == ["train", "8", "40", "2", "16", "24", str(13), "5-5"]
    assert "\u2026" not in text  # nothing was cut off


def test_statistics_of_an_empty_split():
    (row, *_) = dataset_statistics(
        ReIDDataset("none", Path("."), *(Split(name, ()) for name in ("train", "query", "gallery")))
    )
    assert (row.images, row.identities, row.most_per_identity) == (0, 0, 0)


def test_check_images_names_and_counts_the_broken(cargo):
    split = load_cargo(cargo).train
    split.paths[3].write_bytes(b"")
    whole = split.paths[5].read_bytes()
    split.paths[5].write_bytes(whole[: len(whole) // 2])
    seen = []
    check = check_images(split, progress=lambda done, total: seen.append((done, total)))
    assert len(check.split) == 38
    assert split.records[3] not in check.split.records
    assert len(check.broken) == 2
    assert str(split.paths[3]) in check.broken[0]
    assert str(split.paths[5]) in check.broken[1]
    assert seen[-1] == (40, 40)
    with pytest.raises(DataError, match=r"^2 of 40 images of train are broken"):
        check_images(split, on_broken="error")


def test_held_out_identities_are_disjoint_and_can_all_be_queried(cargo):
    dataset = load_cargo(cargo)
    rest, query, gallery = hold_out_identities(dataset, 0.25, seed=3)
    held = set(query.identities.tolist())
    assert len(held) == 2
    assert held == set(gallery.identities.tolist())
    assert held.isdisjoint(rest.train.identities.tolist())
    assert len(rest.train) + len(query) + len(gallery) == len(dataset.train)
    for record in query.records:
        assert any(
            other.identity == record.identity and other.camera != record.camera
            for other in gallery.records
        )
    again = hold_out_identities(dataset, 0.25, seed=3)
    assert again[1] == query
    with pytest.raises(DataError, match="cannot hold out 7 of 8"):
        hold_out_identities(dataset, 0.9)
    with pytest.raises(DataError, match="between 0 and 1"):
        hold_out_identities(dataset, 1.5)
