"""The copy that bandwidth is compared with: non-temporal stores on a CPU, the device's own copy."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("copy_nt.cpp")

# Below this the copy would stay in a cache and say nothing about memory.
LEAST_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
MOST_COPIES = 16


class NoYardstickError(RuntimeError):
    """The non-temporal copy cannot be compiled here."""


@lru_cache(maxsize=1)
def copy_library() -> ctypes.CDLL:
    """Compiles and loads ``copy_nt.cpp``.

    Raises:
        NoYardstickError: no C++ compiler, or the processor has no such stores.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NoYardstickError("no C++ compiler was found (set CXX)")
    with tempfile.TemporaryDirectory(prefix="gsalign-benchmarks-") as folder:
        library = Path(folder) / "copy_nt.so"
        command = [*compiler.split(), "-O3", "-std=c++17", "-shared", "-fPIC", "-pthread"]
        try:
            subprocess.run(
                [*command, str(SOURCE), "-o", str(library)],
                check=True,
                capture_output=True,
                text=True,
            )
        except (OSError, subprocess.CalledProcessError) as error:
            message = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
            raise NoYardstickError(f"{compiler}: {message[0] if message else 'failed'}") from error
        loaded = ctypes.CDLL(str(library))
    loaded.gsalign_copy_nt.restype = ctypes.c_double
    loaded.gsalign_copy_nt.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int,
    ]
    return loaded


def copy_nt(target: Tensor, source: Tensor, threads: int) -> float:
    """Copies a contiguous CPU tensor into another and returns the seconds it took."""
    if target.nbytes != source.nbytes or not (target.is_contiguous() and source.is_contiguous()):
        raise ValueError("target, source: wanted contiguous tensors of as many bytes")
    call = copy_library().gsalign_copy_nt
    return float(call(target.data_ptr(), source.data_ptr(), source.nbytes, threads))


def make_copies(device: torch.device, moved: int) -> tuple[list[Callable[[], object]], int, str]:
    """Copies that each move (read and write) about so many bytes, for timing beside a case.

    Args:
        device: where.
        moved: bytes the case moves. On a CPU raised to what no cache holds; on a GPU, whose
            launches cost a part of a small case's time and of its copy's alike, several copies
            take turns until they fill as much.

    Returns:
        The calls of a turn, the bytes that each really moves, and what kind of copy it is.
    """
    if device.type == "cpu":
        half = max(moved, LEAST_BYTES["cpu"]) // 2
        source = torch.zeros(half, dtype=torch.uint8)
        target = torch.ones_like(source)
        try:
            copy_library()
        except NoYardstickError as error:
            return [partial(target.copy_, source)], 2 * half, f"Tensor.copy_, since {error}"
        call = partial(copy_nt, target, source, torch.get_num_threads())
        return [call], 2 * half, "non-temporal stores"
    # A kernel that reads and writes; a copy of so few bytes by the driver takes longer.
    count = min(MOST_COPIES, -(-LEAST_BYTES["cuda"] // moved))
    values = max(1, moved // 8)
    sources = [torch.ones(values, device=device) for _ in range(count)]
    calls = [partial(torch.neg, s, out=torch.empty_like(s)) for s in sources]
    return calls, 8 * values, "elementwise kernel"
