"""A tiny data set, settings for it and a finished run, made once through the command line."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from tiny_run import TINY, write_people

from gsalign.cli.main import main
from gsalign.config import load_config


@pytest.fixture(autouse=True, scope="session")
def plain_terminal():
    """No colours and no width of a terminal that happens to be there."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("FORCE_COLOR", "RANK", "LOCAL_RANK", "WORLD_SIZE", "GSALIGN_KERNELS"):
            patch.delenv(name, raising=False)
        patch.setenv("COLUMNS", "200")
        yield


@pytest.fixture(autouse=True)
def as_before():
    """Threads and logging as they were: a command sets up the log of the whole process."""
    logger = logging.getLogger("gsalign")
    threads = torch.get_num_threads()
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    logger.handlers[:] = handlers
    logger.setLevel(level)
    logger.propagate = propagate


@pytest.fixture(scope="session")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CARGO folder that no test may change."""
    return write_people(tmp_path_factory.mktemp("people") / "cargo")


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration file for networks that train in a second."""
    path = tmp_path_factory.mktemp("settings") / "tiny.yaml"
    document = load_config(None, TINY).model_dump(mode="json")
    path.write_text(yaml.safe_dump({**document, "name": "tiny"}), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def finished(people: Path, settings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run; for looking at only."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    arguments = ["train", "--config-file", settings, "--data-root", people, "--output", folder]
    assert main([str(argument) for argument in arguments]) == 0
    return folder


@pytest.fixture
def call(capsys):
    """Run a command that must succeed; returns what it printed."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert code == 0, err
        assert err == ""
        return out

    return run


@pytest.fixture
def refuse(capsys):
    """Run a command that must fail through the user; returns the one line it says."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert code == 2
        assert len(err.splitlines()) == 1 and err.endswith("\n"), err
        assert err.startswith("gsalign") and "error: " in err
        assert "Traceback" not in out + err
        return err

    return run
