"""Compiling a family's CUDA kernels for real targets, and what ptxas tells of them; no GPU needed.

Every family has a ``<family>_instances.cu`` beside this file that instantiates its kernels.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

FOLDER = Path(__file__).parent
TARGETS = ("80", "90", "100")
REGISTERS = 65536  # of a multiprocessor, on every target


class Kernel(NamedTuple):
    """What ptxas tells of one kernel: mangled name, registers of a thread, bytes."""

    name: str
    target: str
    registers: int
    spilled: int
    shared: int

    def blocks(self, threads: int) -> int:
        """How many blocks of so many threads the registers of a multiprocessor hold."""
        granted = (self.registers + 7) // 8 * 8  # they are given to warps by eights
        return REGISTERS // (granted * threads)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    if home and (Path(home) / "bin" / "nvcc").exists():
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def parse_ptxas(log: str) -> list[Kernel]:
    """Kernels of a ``-Xptxas -v`` log; a missing figure is an error, not a zero."""
    kernels = []
    for entry in log.split("Compiling entry function '")[1:]:
        stores, loads = re.search(
            r"(\d+) bytes spill stores, (\d+) bytes spill loads", entry
        ).groups()
        shared = re.search(r"(\d+) bytes smem", entry)  # left out by ptxas where there is none
        kernels.append(
            Kernel(
                name=entry.split("'")[0],
                target=re.search(r"for 'sm_(\d+)'", entry)[1],
                registers=int(re.search(r"Used (\d+) registers", entry)[1]),
                spilled=int(stores) + int(loads),
                shared=int(shared[1]) if shared else 0,
            )
        )
    return kernels


def compile_instances(source: str, folder: Path) -> list[Kernel]:
    """Compiles an instances file for every target; skips the test where that cannot be done."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    codes = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in TARGETS]
    command = [nvcc, "-std=c++20", "-O3", "-Xptxas", "-v", *codes, "-c"]
    command += [str(FOLDER / source), "-o", str(folder / "instances.o")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    log = done.stdout + done.stderr
    if done.returncode != 0 and "Unsupported gpu architecture" in log:
        pytest.skip(f"this nvcc does not know one of sm_{', sm_'.join(TARGETS)}")
    assert done.returncode == 0, log
    assert "warning" not in log, log
    return parse_ptxas(log)
