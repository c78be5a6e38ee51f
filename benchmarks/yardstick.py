"""The copy that bandwidth is compared with: non-temporal stores on a CPU, the device's own copy."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("copy_nt.cpp")

# Below this the copy would stay in a cache and say nothing about memory.
LEAST_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}


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


def make_copy(device: torch.device, moved: int) -> tuple[Callable[[], object], int, str]:
    """A copy that moves (reads and writes) about so many bytes, for timing beside a case.

    Args:
        device: where.
        moved: bytes the case moves; raised to what no cache holds.

    Returns:
        The call, the bytes it really moves, and what kind of copy it is.
    """
    half = max(moved, LEAST_BYTES.get(device.type, 64 << 20)) // 2
    source = torch.zeros(half, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    if device.type == "cpu":
        try:
            copy_library()
        except NoYardstickError as error:
            return lambda: target.copy_(source), 2 * half, f"Tensor.copy_, since {error}"
        threads = torch.get_num_threads()
        return lambda: copy_nt(target, source, threads), 2 * half, "non-temporal stores"
    return lambda: target.copy_(source), 2 * half, "Tensor.copy_"
