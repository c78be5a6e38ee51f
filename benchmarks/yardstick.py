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
    least = LEAST_BYTES.get(device.type, 64 << 20)
    count = 1
    if device.type == "cuda":
        count = min(MOST_COPIES, -(-least // moved))
        least = 0
    half = max(moved, least) // 2
    sources = [torch.zeros(half, dtype=torch.uint8, device=device) for _ in range(count)]
    targets = [torch.ones_like(source) for source in sources]
    kind = "Tensor.copy_"
    if device.type == "cpu":
        try:
            copy_library()
        except NoYardstickError as error:
            kind = f"Tensor.copy_, since {error}"
        else:
            threads = torch.get_num_threads()
            call = partial(copy_nt, targets[0], sources[0], threads)
            return [call], 2 * half, "non-temporal stores"
    calls = [partial(t.copy_, s) for t, s in zip(targets, sources, strict=True)]
    return calls, 2 * half, kind
