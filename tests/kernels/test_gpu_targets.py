"""GPU kernels compiled for real targets, no GPU needed: registers, spills, static shared memory."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
TARGETS = ("80", "90")
TRITON_TARGETS = (*TARGETS, "100")
REGISTERS = 65536  # of a multiprocessor, on every target
THREADS = 256  # of a block of the CUDA kernels


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    if home and (Path(home) / "bin" / "nvcc").exists():
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def parse_ptxas(log: str) -> list[dict[str, object]]:
    """Kernels of a ``-Xptxas -v`` log; a missing figure is an error, not a zero."""
    kernels = []
    for entry in log.split("Compiling entry function '")[1:]:
        stores, loads = re.search(
            r"(\d+) bytes spill stores, (\d+) bytes spill loads", entry
        ).groups()
        shared = re.search(r"(\d+) bytes smem", entry)  # left out by ptxas where there is none
        kernels.append(
            {
                "name": entry.split("'")[0],
                "target": re.search(r"for 'sm_(\d+)'", entry)[1],
                "registers": int(re.search(r"Used (\d+) registers", entry)[1]),
                "spilled": int(stores) + int(loads),
                "shared": int(shared[1]) if shared else 0,
            }
        )
    return kernels


def test_the_log_is_understood():
    log = (
        "ptxas info    : Compiling entry function '_Z1fv' for 'sm_90'\n"
        "    32 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info    : Used 48 registers, used 1 barriers, 128 bytes smem, 480 bytes cmem[0]\n"
    )
    assert parse_ptxas(log) == [
        {"name": "_Z1fv", "target": "90", "registers": 48, "spilled": 12, "shared": 128}
    ]


@pytest.fixture(scope="module")
def cuda_kernels(tmp_path_factory) -> list[dict[str, object]]:
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    codes = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in TARGETS]
    output = tmp_path_factory.mktemp("cuda") / "instances.o"
    command = [nvcc, "-std=c++20", "-O3", "-Xptxas", "-v", *codes, "-c"]
    command += [str(FOLDER / "warp_instances.cu"), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    log = done.stdout + done.stderr
    if done.returncode != 0 and "Unsupported gpu architecture" in log:
        pytest.skip(f"this nvcc does not know one of sm_{', sm_'.join(TARGETS)}")
    assert done.returncode == 0, log
    assert "warning" not in log, log
    return parse_ptxas(log)


def test_every_cuda_kernel_was_compiled(cuda_kernels):
    for target in TARGETS:
        names = [kernel["name"] for kernel in cuda_kernels if kernel["target"] == target]
        # Three types, each with vectors staged, vectors in place, single values.
        assert sum("warp_forward_kernel" in name for name in names) == 9
        assert sum("warp_backward_kernel" in name for name in names) == 9
        assert sum("warp_reduce_kernel" in name for name in names) == 1
        assert sum("warp_base_kernel" in name for name in names) == 1
        assert len(names) == 20


def test_cuda_kernels_spill_nothing_and_take_no_static_shared_memory(cuda_kernels):
    assert [kernel for kernel in cuda_kernels if kernel["spilled"] or kernel["shared"]] == []


def test_cuda_kernels_leave_room_for_the_planned_blocks(cuda_kernels):
    """Registers are given to warps by eights; ``warp_plan.h`` counts on so many staged blocks."""
    plan = (FOLDER.parents[1] / "csrc" / "warp" / "warp_plan.h").read_text()
    blocks = {
        name: int(re.search(rf"k{name}Blocks = (\d+);", plan)[1])
        for name in ("Forward", "Backward")
    }
    # "ELb1E" is the mangled last template argument of a staged kernel: true.
    assert sum("ELb1E" in kernel["name"] for kernel in cuda_kernels) == 6 * len(TARGETS)
    for kernel in cuda_kernels:
        name = kernel["name"]
        wanted = 3
        if "ELb1E" in name:
            wanted = blocks["Forward" if "forward" in name else "Backward"]
        granted = (kernel["registers"] + 7) // 8 * 8
        assert granted * THREADS * wanted <= REGISTERS, kernel


# Registers per thread by kernel; 64 and fewer leave room for 1024 threads on a multiprocessor.
TRITON_REGISTERS = {
    "forward_kernel": 104,
    "backward_kernel": 88,
    "taps_kernel": 48,
    "sort_kernel": 112,
    "project_kernel": 64,
    "reduce_kernel": 32,
}


@pytest.fixture(scope="module")
def triton_kernels(tmp_path_factory) -> list[dict[str, object]]:
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if not list(Path(find_spec("triton").origin).parent.glob("backends/nvidia/bin/ptxas*")):
        pytest.skip("this triton brings no ptxas")
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("TRITON_INTERPRET", "GSALIGN_KERNELS")
    }
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["OMP_NUM_THREADS"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(FOLDER.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    done = subprocess.run(
        [sys.executable, str(FOLDER / "compile_triton.py"), *TRITON_TARGETS],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_every_triton_kernel_was_compiled(triton_kernels):
    compiled = {(kernel["kernel"], str(kernel["target"])) for kernel in triton_kernels}
    assert compiled == {(name, target) for name in TRITON_REGISTERS for target in TRITON_TARGETS}
    for name in ("forward_kernel", "backward_kernel"):
        dtypes = {kernel["dtype"] for kernel in triton_kernels if kernel["kernel"] == name}
        assert dtypes == {"float32", "float16", "bfloat16"}


def test_triton_kernels_spill_nothing_and_take_few_registers(triton_kernels):
    assert [kernel for kernel in triton_kernels if kernel["spilled"] > 0] == []
    for kernel in triton_kernels:
        assert 0 < kernel["registers"] <= TRITON_REGISTERS[kernel["kernel"]], kernel
        assert kernel["shared"] <= 1024, kernel
