"""What every query found, written in three formats and read back."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gsalign.data import ImageRecord, ReIDDataset, Split
from gsalign.errors import ConfigError
from gsalign.evaluation import Features, compare
from gsalign.evaluation.dump import COLUMNS, check_format, query_rows, write_rows

ROOT = Path("/sets/my people")


def split(name, *records):
    return Split(
        name,
        tuple(
            ImageRecord(ROOT / name / file, identity, camera, 0, identity_text=text)
            for file, identity, text, camera in records
        ),
    )


@pytest.fixture
def found():
    """Two queries; the second one's person is in no other camera."""
    query = split("query", ("ä.jpg", 0, "anna", 1), ("b.jpg", 1, "zoë", 1))
    gallery = split(
        "gallery",
        ("0.jpg", 0, "anna", 1),
        ("1.jpg", 0, "anna", 2),
        ("2.jpg", 2, "", 3),
        ("3.jpg", 1, "zoë", 1),
    )
    angles = {"query": [0.0, 1.5], "gallery": [0.0, 0.4, 0.2, 1.5]}
    dataset = ReIDDataset("table", ROOT, split("train"), query, gallery)
    features = [
        Features(
            embeddings=torch.tensor([[np.cos(a), np.sin(a)] for a in angles[part.name]]),
            identities=part.identities,
            cameras=part.cameras,
            views=part.views,
            indices=np.arange(len(part)),
            paths=tuple(map(str, part.paths)),
        )
        for part in (query, gallery)
    ]
    comparison = compare(*features, "all")
    return comparison, comparison.evaluate(), dataset


def test_a_row_per_query(found):
    first, second = query_rows(*found, top=2)
    assert tuple(first) == COLUMNS
    assert first["protocol"] == "all" and first["view"] == "ground" and first["camera"] == "1"
    assert (first["query"], first["identity"]) == ("query/ä.jpg", "anna")
    assert (first["positives"], first["first_rank"]) == (1, 2)
    assert first["AP"] == first["INP"] == 0.5
    # The image of the same person and camera is nearest, and left out.
    assert first["nearest"] == ["gallery/2.jpg", "gallery/1.jpg"]
    assert first["nearest_identities"] == ["2", "anna"]
    assert first["nearest_right"] == [False, True]
    assert first["nearest_distances"] == pytest.approx([1 - np.cos(0.2), 1 - np.cos(0.4)], abs=1e-6)
    assert (second["positives"], second["first_rank"], second["AP"]) == (0, None, None)


def test_a_gallery_smaller_than_what_is_asked_for(found):
    first, second = query_rows(*found, top=50)
    assert len(first["nearest"]) == len(second["nearest"]) == 3


def test_all_formats_hold_the_same(found, tmp_path):
    rows = list(query_rows(*found, top=3))
    write_rows(tmp_path / "out.jsonl", rows)
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows
    write_rows(tmp_path / "out.csv", rows)
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["query"] for row in read] == ["query/ä.jpg", "query/b.jpg"]
    assert json.loads(read[0]["nearest"]) == rows[0]["nearest"]
    assert float(read[0]["AP"]) == 0.5 and read[1]["AP"] == ""
    parquet = pytest.importorskip("pyarrow.parquet")
    write_rows(tmp_path / "out.parquet", rows)
    assert parquet.read_table(tmp_path / "out.parquet").to_pylist() == rows


def test_other_formats_are_refused_at_once(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"must end in \.csv, \.jsonl, \.parquet"):
        check_format(tmp_path / "out.xlsx")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"needs pyarrow.*\[search\]'; or write \.csv"):
        check_format(tmp_path / "out.parquet")
    check_format(tmp_path / "out.CSV")
