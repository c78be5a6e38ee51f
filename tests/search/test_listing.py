"""Which images are meant, and their tables on disk."""

from __future__ import annotations

import os

import numpy as np
import pytest

from gsalign.errors import DataError
from gsalign.search import ImageTable, list_images, read_table, write_table


def test_a_folder_is_listed_in_order_without_what_is_no_image(photographs):
    table = list_images([photographs])
    assert len(table) == 11 and len(set(table.paths)) == 11
    assert all(os.path.isabs(path) and os.path.isfile(path) for path in table.paths)
    assert list(table.paths) == sorted(table.paths)
    assert set(table.identities + table.cameras + table.views) == {""}


def test_sources_are_joined_and_no_image_comes_twice(photographs, tmp_path, monkeypatch):
    monkeypatch.chdir(photographs)
    lines = tmp_path / "some.txt"
    lines.write_text(f"{photographs}/camera 0/img0.jpg\n\n{photographs}/camera 1/img1.jpg\n")
    table = list_images([lines, "camera 0/img2.jpg", photographs / "camera 0"])
    names = [os.path.basename(path) for path in table.paths]
    assert names[:3] == ["img0.jpg", "img1.jpg", "img2.jpg"] and len(names) == 7


def test_names_of_cargo_give_labels(tmp_path):
    (tmp_path / "Cam2").mkdir()
    (tmp_path / "Cam2" / "Cam2_day_2519_320.jpg").touch()
    table = list_images([tmp_path], names="cargo")
    assert (table.identities, table.cameras, table.views) == (("2519",), ("2",), ("aerial",))
    (tmp_path / "Cam2" / "holiday.jpg").touch()
    with pytest.raises(DataError, match=r"holiday\.jpg is no name of CARGO"):
        list_images([tmp_path], names="cargo")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_tables_survive_the_disk(tmp_path, suffix):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    awkward = ("/a b/ü,\"'\n.jpg", "/名.png", "/x\ty")
    table = ImageTable(awkward, ("007", "", "Ann, B"), ("1", "2", ""), ("aerial", "", "ground"))
    path = tmp_path / f"t.{suffix}"
    write_table(table, path, ids=np.array([3, 2**40, 7]))
    found, ids = read_table(path)
    assert found == table and ids.tolist() == [3, 2**40, 7]
    assert found.digest() == table.digest() != table.select([1, 0, 2]).digest()


def test_a_table_of_ones_own(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(
        "\ufeffcamera, path,comment,identity\nroof,a/1.jpg,x,7\n\nroof,/b.jpg,,\n", encoding="utf-8"
    )
    table = list_images([path])
    assert table.paths == (str(tmp_path / "a" / "1.jpg"), "/b.jpg")
    assert table.identities == ("7", "") and table.cameras == ("roof", "roof")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("file,identity\nx.jpg,1\n", "no column 'path', but file, identity"),
        ("", "no column 'path', but nothing"),
        ("path,view\nx.jpg,drone\n", "row 1: view is 'drone'; wanted aerial, ground"),
        ("path,view\nx.jpg\n", "line 2: 1 cells, the first line has 2"),
        ("path,path\nx.jpg,y.jpg\n", "names a column twice"),
        ("path,camera\n,roof\n", "row 1: path is ''"),
        ("path\n", "has no rows"),
    ],
)
def test_a_table_that_is_none_is_told_with_the_line(tmp_path, text, told):
    path = tmp_path / "mine.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=told):
        list_images([path])


def test_sources_that_are_none_are_told(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").touch()
    (tmp_path / "latin.csv").write_bytes(b"path\nGr\xf6\xdfe.jpg\n")
    with pytest.raises(DataError, match="empty holds no images"):
        list_images([tmp_path / "empty"])
    with pytest.raises(DataError, match=r"nowhere does not exist; wanted a folder"):
        list_images([tmp_path / "nowhere"])
    with pytest.raises(DataError, match=r"blank\.txt names no image"):
        list_images([tmp_path / "blank.txt"])
    with pytest.raises(DataError, match=r"latin\.csv cannot be read"):
        list_images([tmp_path / "latin.csv"])
    with pytest.raises(DataError, match="no images"):
        list_images([])


def test_a_name_that_no_table_can_hold_is_told(tmp_path):
    try:
        with open(os.fsencode(tmp_path) + b"/caf\xe9.jpg", "wb"):
            pass
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    with pytest.raises(DataError, match="not UTF-8"):
        list_images([tmp_path])
