"""Compiling and running the programs that execute CUDA kernels with host threads.

And what their tests share: reading results, judging them.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parent
BUILDS = {
    "plain": ["-O1"],
    "address": ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g1", "-fsanitize=thread"],
}

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@dataclass(frozen=True)
class Run:
    """How a driver ended, and where its results lie."""

    done: subprocess.CompletedProcess[str]
    results: Path


def compile_drivers(source: str, folder: Path) -> dict[str, Path]:
    """The program of a source file of this folder, compiled once per build."""

    def compile_one(name: str) -> Path:
        target = folder / name
        command = ["g++", "-std=c++20", "-Wall", "-Wextra", "-Werror", f"-I{FOLDER}"]
        command += [*BUILDS[name], str(FOLDER / source), "-o", str(target), "-pthread"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return target

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(BUILDS, pool.map(compile_one, BUILDS), strict=True))


def run(driver: Path, folder: Path, write_cases: Callable[[Path], None], *options: str) -> Run:
    """Runs a driver on the cases that ``write_cases`` writes to the path it is given."""
    folder.mkdir(parents=True, exist_ok=True)
    write_cases(folder / "cases")
    environment = dict(os.environ, TSAN_OPTIONS="halt_on_error=1", ASAN_OPTIONS="detect_leaks=0")
    done = subprocess.run(
        [str(driver), str(folder / "cases"), str(folder / "results"), *options],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    return Run(done, folder / "results")


def run_faulty(
    driver: Path, folder: Path, write_cases: Callable[[Path], None], *options: str
) -> Run:
    """As :func:`run` of the thread sanitizer with a fault asked for, which it is to find.

    It keeps the last few accesses of a word without a lock, so that on a busy machine a race can
    escape it, rarely: it gets three tries.
    """
    for _ in range(3):
        found = run(driver, folder, write_cases, *options)
        if found.done.returncode != 0:
            break
    return found


def run_builds(
    drivers: dict[str, Path], folder: Path, write_cases: dict[str, Callable[[Path], None]]
) -> dict[str, Run]:
    """Runs every build on the cases written for it."""
    with ThreadPoolExecutor(2) as pool:
        runs = pool.map(lambda b: run(drivers[b], folder / b, write_cases[b]), BUILDS)
        return dict(zip(BUILDS, runs, strict=True))


def assert_clean(run: Run) -> None:
    """The program ended well, and no sanitizer had anything to say."""
    assert run.done.returncode == 0, run.done.stderr[-4000:]
    assert run.done.stderr == ""


class Reader:
    """Takes one value after the other from what a driver wrote; at the end nothing is left."""

    def __init__(self, path: Path) -> None:
        self._data = path.read_bytes()
        self._at = 0

    def integers(self, count: int) -> tuple[int, ...]:
        """The next ``count`` int32."""
        values = struct.unpack_from(f"<{count}i", self._data, self._at)
        self._at += 4 * count
        return values

    def tensor(self, shape: tuple[int, ...], kind: type = np.float32) -> torch.Tensor:
        """The next tensor, of a NumPy type."""
        values = np.frombuffer(self._data, kind, int(np.prod(shape)), self._at)
        self._at += values.nbytes
        return torch.from_numpy(values.reshape(shape).copy())

    def finish(self) -> None:
        """Fails where something is left."""
        assert self._at == len(self._data)


def relative_error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """In the 2-norm; the error itself where zeros are wanted."""
    error, scale = float((actual.double() - wanted).norm()), float(wanted.norm())
    return error / scale if scale > 0 else error
