"""CPU code on every instruction set of this processor, not only on the one that would be chosen."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


def run(driver: str, folder: Path) -> dict[str, str]:
    """Compile a driver and run it; what it printed, first word to second."""
    program = folder / driver
    command = ["g++", "-std=c++20", "-O2", "-fopenmp-simd", "-fno-math-errno"]
    command += ["-Wall", "-Wno-psabi", "-Werror"]
    command += [str(FOLDER / f"{driver}.cpp"), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    return dict(line.split() for line in done.stdout.splitlines())


@pytest.mark.parametrize("driver", ["token_rows_driver", "pool_rows_driver"])
def test_row_functions(driver, tmp_path):
    sets = run(driver, tmp_path)
    assert sets.pop("rows_baseline") == "524"
    if platform.machine() == "x86_64":
        assert set(sets) == {"rows_avx2", "rows_avx512", "rows_avx512_bf16"}
        assert set(sets.values()) <= {"524", "skipped"}


def test_splines_in_vectors_of_every_width(tmp_path):
    widths = run("vector_widths_driver", tmp_path)
    assert int(widths.pop("16")) > 0
    if platform.machine() == "x86_64":
        assert set(widths) == {"32", "64"}
        assert all(checks == "skipped" or int(checks) > 0 for checks in widths.values())
