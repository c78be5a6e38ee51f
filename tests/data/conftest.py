"""A tiny CARGO folder, drawn on the spot."""

from __future__ import annotations

from pathlib import Path

import pytest
from cargo_folder import write_split


@pytest.fixture
def cargo(tmp_path: Path) -> Path:
    """8 training people in cameras 1 and 7, 3 test people in cameras 2, 5, 6 and 13."""
    root = tmp_path / "cargo"
    write_split(root, "train", {i: {1: 3, 7: 2} for i in range(10, 90, 10)})
    write_split(root, "query", {i: {2: 1, 13: 1} for i in (101, 102, 103)}, start=500)
    write_split(root, "gallery", {i: {2: 1, 5: 1, 6: 1, 13: 2} for i in (101, 102, 103)}, 600)
    return root
