"""Rows of the token warp on every instruction set of this processor, not only the one in use."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_every_instruction_set_gives_the_same_rows(tmp_path):
    driver = tmp_path / "rows"
    command = ["g++", "-std=c++20", "-O2", "-fno-math-errno", "-Wall", "-Wno-psabi", "-Werror"]
    command += [str(FOLDER / "token_rows_driver.cpp"), "-o", str(driver)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    done = subprocess.run([str(driver)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    sets = dict(line.split() for line in done.stdout.splitlines())
    assert sets.pop("rows_baseline") == "524"
    if platform.machine() == "x86_64":
        assert set(sets) == {"rows_avx2", "rows_avx512", "rows_avx512_bf16"}
        assert set(sets.values()) <= {"524", "skipped"}
