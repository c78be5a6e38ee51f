"""Where the helpers of other tests are, and records of a run to draw."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from tiny_run import write_people

from gsalign.data import ReIDDataset, load_cargo


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ReIDDataset:
    """4 test people in cameras 2, 3, 6 and 13."""
    return load_cargo(write_people(tmp_path_factory.mktemp("people") / "cargo"))
