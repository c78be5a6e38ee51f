"""``gsalign data check``: any set, and what it says of good and bad ones."""

from __future__ import annotations

import shutil

import pytest
from cargo_folder import write_image, write_split
from PIL import Image

from gsalign.cli.main import main
from gsalign.data import market1501, registry
from gsalign.data.layout import Published


def test_a_partial_copy_is_told_and_no_failure(call, people):
    told = call("data", "check", people)
    assert "CARGO in" in told
    assert "warning: train: 24 images, published 51,451 (-51,427); 6 identities" in told
    assert "this is not the published set as a whole" in told
    assert "all 40 images can be read\n" in told


@pytest.fixture
def market(tmp_path):
    root = tmp_path / "Market"
    for name in ("bounding_box_train/0002_c1s1_000451_03", "bounding_box_train/0002_c2s1_000451_01",
                 "query/0003_c1s1_000001_00", "bounding_box_test/0003_c2s3_000151_01",
                 "bounding_box_test/-1_c2s3_000151_01"):  # fmt: skip
        write_image(root / f"{name}.jpg", 1)
    return root


def test_the_published_counts_of_a_whole_copy_agree(call, market, monkeypatch):
    assert "warning: gallery: 2 images, published 19,732" in call("data", "check", market)
    counts = (Published("train", 2, 1), Published("gallery", images=9, known={2: "a later one"}))
    entry = market1501.MARKET_1501.__class__(
        **{**market1501.MARKET_1501.__dict__, "published": counts}
    )
    entries = {"market1501": registry.DatasetEntry(entry, market1501.load_market1501)}
    monkeypatch.setattr(registry, "DATASETS", {**registry.DATASETS, **entries})
    told = call("data", "check", market)
    assert "gallery: 1 more images take no part" in told
    assert "known difference: gallery: 2 images, published 9 (-7): a later one" in told
    assert "the 3 published counts agree, or differ as is known" in told
    assert "warning" not in told


def test_singletons_are_counted_and_told(call, own_people):
    write_split(own_people, "train", {300: {3: 1}}, start=900)
    told = call("data", "check", own_people, "--fast")
    assert "warning: 1 training identities have only one image" in told
    assert "train        7        25" in told


def test_more_bad_names_than_training_allows_fail(call, refuse, own_people):
    for number in range(10):
        write_image(own_people / "train" / "Cam1" / f"{number}.jpg", number)
    assert "10 image name(s)" in call("data", "check", own_people, "--fast")
    write_image(own_people / "train" / "Cam1" / "10.jpg", 1)
    told = refuse("data", "check", own_people)
    assert "11 image names could not be used and training allows 10; rename them" in told
    assert "data.max_bad_names=11" in told


def test_odd_images_are_told_and_broken_ones_fail(call, refuse, own_people, capsys):
    first, second = sorted((own_people / "train").rglob("*.jpg"))[:2]
    Image.new("CMYK", (24, 48)).save(first)
    told = call("data", "check", own_people)
    assert f"odd: image {first} is CMYK; it is read as RGB" in told
    assert "all 40 images can be read, 1 are odd" in told
    second.write_bytes(b"")
    assert main(["data", "check", str(own_people)]) == 2
    out, err = capsys.readouterr()
    assert f"image {second} is empty (0 bytes)\n" in out
    assert "1 of 40 images cannot be read" in err


def test_brackets_in_names_are_told_as_they_are(call, own_people, tmp_path):
    root = own_people.rename(tmp_path / "[new] people")
    file = next((root / "train").rglob("*.jpg"))
    Image.new("CMYK", (24, 48)).save(file)
    told = call("data", "check", root)
    assert f"CARGO in {root}" in told and f"odd: image {file} is CMYK" in told


def test_wrong_sets_are_one_line(refuse, call, people, tmp_path):
    assert "does not exist" in refuse("data", "check", tmp_path / "nowhere")
    assert "'duke' is unknown" in refuse("data", "check", people, "--dataset", "duke")
    table = tmp_path / "a table.csv"
    table.write_text("path,identity\nnone.jpg,1\n")
    assert "line 2: none.jpg does not exist" in refuse("data", "check", table)


def test_ones_own_folder_goes_all_the_way(call, settings, tmp_path):
    root, folder = tmp_path / "мои люди", tmp_path / "run"
    for split, people, count in (("train", "abcdef", 4), ("query", "xy", 1), ("gallery", "xy", 2)):
        for person in people:
            for number in range(count):
                name = f"cam{number % 2 + (split == 'query')}_{number} {person}.jpg"
                write_image(root / split / f"Frau {person}" / name, number)
    assert "a folder of your own" in call("data", "check", root)
    data = ("data.name=folder", "--data-root", root)
    call("train", "--config-file", settings, "--output", folder, *data)
    out = tmp_path / "found.jsonl"
    told = call("eval", "--checkpoint", folder / "model_final.safetensors", "--dump", out)
    assert "folder ALL" in told and "2/2" in told
    assert '"identity": "Frau x"' in out.read_text(encoding="utf-8")
    # Nobody left to find: said, and no figures.
    shutil.rmtree(root / "gallery" / "Frau x")
    shutil.rmtree(root / "gallery" / "Frau y")
    write_image(root / "gallery" / "Frau z" / "1.jpg", 1)
    told = call("eval", "--checkpoint", folder / "model_final.safetensors")
    assert "warning: ALL has no figures: none of its 2 queries has another image" in told
