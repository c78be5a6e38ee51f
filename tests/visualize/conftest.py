"""Where the helpers of other tests are, images to draw, and a watch on what is drawn."""

from __future__ import annotations

import pkgutil
import sys
import warnings
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from matplotlib.figure import Figure
from tiny_run import write_people

import gsalign.visualize
from gsalign.data import ReIDDataset, load_cargo
from gsalign.visualize.style import new_figure


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ReIDDataset:
    """4 test people in cameras 2, 3, 6 and 13."""
    return load_cargo(write_people(tmp_path_factory.mktemp("people") / "cargo"))


@pytest.fixture(autouse=True)
def no_warnings():
    """A picture whose parts do not fit makes matplotlib warn; that is a fault."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.fixture
def panels(monkeypatch):
    """The figures that were made, to look at what was put on them."""
    made: list[Figure] = []

    def keep(*arguments):
        made.append(new_figure(*arguments))
        return made[-1]

    for module in pkgutil.iter_modules(gsalign.visualize.__path__):
        # The package has functions of the names of some, which hide the modules.
        found = sys.modules.get(f"gsalign.visualize.{module.name}")
        if hasattr(found, "new_figure") and module.name != "style":
            monkeypatch.setattr(found, "new_figure", keep)
    return made
