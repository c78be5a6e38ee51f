"""One tiny data set for all tests of the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_run import write_part_labels, write_people


@pytest.fixture(scope="session")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CARGO folder with label maps that no test may change."""
    return write_part_labels(write_people(tmp_path_factory.mktemp("people") / "cargo"))


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in one order, and no more of the machine than needed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
