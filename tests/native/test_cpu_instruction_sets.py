"""CPU code on every instruction set of this processor, not only on the one that would be chosen."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

FOLDER = Path(__file__).parent
SOURCES = FOLDER.parents[1] / "csrc"

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


def run(driver: str, folder: Path) -> dict[str, str]:
    """Compile a driver and run it; what it printed, first word to second."""
    program = folder / driver
    command = ["g++", "-std=c++20", "-O2", "-fopenmp-simd", "-fno-math-errno"]
    command += ["-Wall", "-Wno-psabi", "-Werror"]
    command += [str(FOLDER / f"{driver}.cpp"), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=600)
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


@pytest.mark.skipif(platform.machine() != "x86_64", reason="one width of vectors only")
@pytest.mark.parametrize("width", [16, 32])
def test_operators_in_vectors_of_lesser_processors(width, tmp_path):
    """The families whose vectors are as wide as the processor's, compiled for narrower ones."""
    if width == 32 and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this processor has no vectors of 32 bytes")
    library = tmp_path / "operators.so"
    command = ["g++", "-std=c++20", "-O2", "-fPIC", "-shared", "-fopenmp-simd", "-fno-math-errno"]
    command += ["-Wall", "-Wno-psabi", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += [f"-DGSALIGN_FORCED_VECTOR_BYTES={width}", "-o", str(library)]
    command += [f"-I{path}" for path in cpp_extension.include_paths()]
    command += [str(SOURCES / "register.cpp")]
    command += [str(SOURCES / f"{f}/{f}_cpu.cpp") for f in ("conv", "distance", "prototype")]
    command += [f"-L{path}" for path in cpp_extension.library_paths()]
    command += ["-ltorch", "-ltorch_cpu", "-lc10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    command = [sys.executable, str(FOLDER / "forced_width.py"), str(library)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    errors = json.loads(done.stdout)
    assert len(errors) == 18
    for name, error in errors.items():
        assert error < (1e-14 if name.endswith("float64") else 4e-6), name
