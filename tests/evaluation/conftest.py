"""The compiled ranker: the installed one, or one compiled here for the occasion."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

import gsalign.evaluation.ranking as ranking

SOURCES = Path(__file__).parents[2] / "csrc"


@pytest.fixture(scope="session")
def bindings(tmp_path_factory):
    """The pybind11 module."""
    try:
        return importlib.import_module("gsalign_kernels._bindings")
    except ImportError:
        compiler = shutil.which("c++") or shutil.which("g++")
        pybind11 = pytest.importorskip("pybind11")
        if compiler is None:
            pytest.skip("gsalign_kernels._bindings is not built and there is no C++ compiler")
    target = tmp_path_factory.mktemp("bindings") / (
        "_bindings" + sysconfig.get_config_var("EXT_SUFFIX")
    )
    includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    subprocess.run(
        [
            compiler, "-O2", "-std=c++20", "-shared", "-fPIC", "-pthread",
            *(f"-I{folder}" for folder in includes),
            str(SOURCES / "bindings.cpp"), str(SOURCES / "ranking" / "ranking.cpp"),
            "-o", str(target),
        ],
        check=True,
    )  # fmt: skip
    spec = importlib.util.spec_from_file_location("_bindings", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def compiled(bindings, monkeypatch):
    """Make the compiled ranker available to the library."""
    monkeypatch.setattr(ranking, "_compiled", bindings)
    monkeypatch.setattr(ranking, "_why_not", "")
    return bindings
