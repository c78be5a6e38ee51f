"""GPU kernels compiled for real targets, no GPU needed: registers, spills, static shared memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from cuda_targets import TARGETS, Kernel, compile_instances, parse_ptxas

FOLDER = Path(__file__).parent
CSRC = FOLDER.parents[1] / "csrc"

# Kernels of a family, and how many instances each has: types, times the variants.
CUDA_KERNELS = {
    "warp": {
        "warp_forward_kernel": 9,  # vectors staged, vectors in place, single values
        "warp_backward_kernel": 9,
        "warp_reduce_kernel": 1,
        "warp_base_kernel": 1,
    },
    "warp_image": {
        "warp_image_forward_kernel": 6,  # vectors of channels, single values
        "warp_image_boxes_kernel": 1,
        "warp_image_gradient_kernel": 3,
        "warp_image_spline_kernel": 6,
        "tps_sum_partials_kernel": 1,
    },
    "pool": {
        # Three types; vectors with 1, 4, 6, 8 parts at once, single values, maxima of both. Forward
        # also 8 parts of both and maxima of both where one round over the tokens is not enough.
        "pool_forward_kernel": 33,
        "pool_backward_kernel": 21,
        "pool_finish_kernel": 1,
    },
    "tps": {
        "tps_solve_kernel": 4,  # staged, in place
        "tps_solve_backward_kernel": 4,
        "tps_evaluate_kernel": 4,  # two columns, eight
        "tps_points_backward_kernel": 4,
        "tps_gradient_kernel": 4,
        "tps_sum_partials_kernel": 3,
    },
    "prototype": {  # vectors, single values
        "prototype_means_kernel": 2,
        "prototype_rows_kernel": 2,
        "prototype_backward_kernel": 2,
    },
}


def test_the_log_is_understood():
    log = (
        "ptxas info    : Compiling entry function '_Z1fv' for 'sm_90'\n"
        "    32 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info    : Used 48 registers, used 1 barriers, 128 bytes smem, 480 bytes cmem[0]\n"
    )
    kernel = Kernel(name="_Z1fv", target="90", registers=48, spilled=12, shared=128)
    assert parse_ptxas(log) == [kernel]
    assert kernel.blocks(256) == 5 and kernel._replace(registers=49).blocks(256) == 4


@pytest.fixture(scope="module")
def cuda_kernels(tmp_path_factory):
    """The kernels of a family, compiled when first asked for."""
    compiled = {}

    def of(family: str) -> list[Kernel]:
        if family not in compiled:
            folder = tmp_path_factory.mktemp("cuda")
            compiled[family] = compile_instances(f"{family}_instances.cu", folder)
        return compiled[family]

    return of


@pytest.mark.parametrize("family", CUDA_KERNELS)
def test_every_cuda_kernel_was_compiled(family, cuda_kernels):
    for target in TARGETS:
        names = [kernel.name for kernel in cuda_kernels(family) if kernel.target == target]
        # A mangled name starts with its length, so that none is the end of another.
        counts = {
            kernel: sum(f"{len(kernel)}{kernel}" in name for name in names)
            for kernel in CUDA_KERNELS[family]
        }
        assert counts == CUDA_KERNELS[family]
        assert len(names) == sum(counts.values())


# Bytes written and read again, outside the hot loops: the sines of a large angle take registers
# from what is prepared around them. With and without them the token warp was as fast on an H200.
SPILLED = {"warp": 32}


@pytest.mark.parametrize("family", CUDA_KERNELS)
def test_cuda_kernels_spill_next_to_nothing_and_take_no_static_shared_memory(family, cuda_kernels):
    most = SPILLED.get(family, 0)
    assert [k for k in cuda_kernels(family) if k.spilled > most or k.shared] == []


def test_token_warp_leaves_room_for_the_planned_blocks(cuda_kernels):
    """``warp_plan.h`` counts on so many staged blocks of 256 threads."""
    plan = (CSRC / "warp" / "warp_plan.h").read_text()
    blocks = {
        name: int(re.search(rf"k{name}Blocks = (\d+);", plan)[1])
        for name in ("Forward", "Backward")
    }
    kernels = cuda_kernels("warp")
    # "ELb1E" is the mangled last template argument of a staged kernel: true.
    assert sum("ELb1E" in kernel.name for kernel in kernels) == 6 * len(TARGETS)
    for kernel in kernels:
        wanted = 3
        if "ELb1E" in kernel.name:
            wanted = blocks["Forward" if "forward" in kernel.name else "Backward"]
        assert kernel.blocks(256) >= wanted, kernel


def test_image_warp_leaves_room_for_blocks(cuda_kernels):
    """``warp_image_plan.h`` tells the compiler how many of 256 threads; forward has 6."""
    plan = (CSRC / "warp" / "warp_image_plan.h").read_text()
    gradient, spline = (
        int(re.search(rf"k{name}Blocks = (\d+);", plan)[1]) for name in ("Gradient", "Spline")
    )
    wanted = {"forward": 6, "boxes": gradient, "gradient": gradient, "spline": spline, "sum": 8}
    for kernel in cuda_kernels("warp_image"):
        name = re.search(r"(forward|boxes|gradient|spline|sum)_", kernel.name)[1]
        assert kernel.blocks(256) >= wanted[name], kernel


def test_pooling_leaves_room_for_blocks(cuda_kernels):
    """``pool_plan.h`` tells the compiler how many of how many threads; finishing has 4 of 256."""
    plan = (CSRC / "pool" / "pool_plan.h").read_text()

    def blocks(name: str) -> int:
        return int(re.search(rf"k{name} = (\d+);", plan)[1])

    for kernel in cuda_kernels("pool"):
        name, maxima, once = re.search(
            r"pool_(forward|backward|finish)_kernel(?:.*?ELb(\d)(?:ELb(\d))?E)?", kernel.name
        ).groups()
        if name == "finish":
            wanted, threads = 4, 256
        elif name == "backward":
            wanted = blocks("BackwardBlocksOfMaxima" if maxima == "1" else "BackwardBlocks")
            threads = 128
        else:
            hot = maxima == "0" and once == "1"
            wanted = blocks("ForwardBlocks" if hot else "ForwardBlocksOfRest")
            threads = 128 if "Half" in kernel.name or "BFloat16" in kernel.name else 256
        assert kernel.blocks(threads) >= wanted, kernel


def test_splines_leave_room_for_blocks(cuda_kernels):
    """Of 256 threads: 4 where two columns of float32 are held, which is the hot case, else 2."""
    for kernel in cuda_kernels("tps"):
        hot = "kernelIfLi2E" in kernel.name or "sum_partials" in kernel.name
        assert kernel.blocks(256) >= (4 if hot else 2), kernel


def test_prototype_loss_leaves_room_for_blocks(cuda_kernels):
    """``prototype_plan.h`` tells the compiler how many over classes; those over rows have 8."""
    plan = (CSRC / "prototype" / "prototype_plan.h").read_text()
    resident = int(re.search(r"kResidentBlocks = (\d+);", plan)[1])
    for kernel in cuda_kernels("prototype"):
        assert kernel.blocks(256) >= (8 if "rows" in kernel.name else resident), kernel


# Registers per thread by family and kernel; 64 and fewer leave room for 1024 threads on a
# multiprocessor.
TRITON_REGISTERS = {
    ("warp_tokens", "forward_kernel"): 104,
    ("warp_tokens", "backward_kernel"): 88,
    ("warp_tokens", "taps_kernel"): 48,
    ("warp_tokens", "sort_kernel"): 112,
    ("warp_tokens", "project_kernel"): 64,
    ("warp_tokens", "reduce_kernel"): 32,
    ("tps", "evaluate_kernel"): 48,
    ("tps", "coefficients_backward_kernel"): 168,
    ("tps", "points_backward_kernel"): 64,
    ("tps", "reduce_kernel"): 32,
    ("tps_solve", "assemble_kernel"): 72,
    ("tps_solve", "transform_kernel"): 128,
    ("tps_solve", "cholesky_kernel"): 128,
    ("tps_solve", "substitute_kernel"): 240,
    ("tps_solve", "adjoint_kernel"): 104,
    ("warp_image", "forward_kernel"): 104,
    ("warp_image", "taps_kernel"): 88,
    ("warp_image", "gather_kernel"): 136,
    ("pool", "forward_kernel"): 176,
    ("pool", "backward_kernel"): 128,
    ("pool", "finish_kernel"): 96,
    ("prototype", "means_kernel"): 88,
    ("prototype", "rows_kernel"): 56,
    ("prototype", "backward_kernel"): 128,
    # Of eight warps: one program on a multiprocessor.
    ("conv", "forward_kernel"): 232,
}
TRITON_SHARED = 16384  # bytes; the pooling's sums of all parts at once, with Triton 3.6
# Products are fed from three stages of shared memory.
TRITON_STAGED = {"conv": 80 * 1024}
# Bytes written before and read again after the loop, on sm_100, by the pooling under a softmax.
TRITON_SPILLED = {("pool", "forward_kernel"): 16, ("pool", "backward_kernel"): 40}


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
        [sys.executable, str(FOLDER / "compile_triton.py"), *TARGETS],
        capture_output=True,
        text=True,
        timeout=1500,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_every_triton_kernel_was_compiled(triton_kernels):
    compiled = {(row["family"], row["kernel"], str(row["target"])) for row in triton_kernels}
    wanted = {(*kernel, target) for kernel in TRITON_REGISTERS for target in TARGETS}
    assert compiled == wanted
    for family, kernels in {
        "warp_tokens": ("forward_kernel", "backward_kernel"),
        "warp_image": ("forward_kernel", "taps_kernel", "gather_kernel"),
        "pool": ("forward_kernel", "backward_kernel"),
        "conv": ("forward_kernel",),
    }.items():
        for name in kernels:
            rows = [r for r in triton_kernels if (r["family"], r["kernel"]) == (family, name)]
            assert {row["dtype"] for row in rows} == {"float32", "float16", "bfloat16"}
    for name in ("evaluate_kernel", "coefficients_backward_kernel", "substitute_kernel"):
        rows = [row for row in triton_kernels if row["kernel"] == name]
        assert {row["dtype"] for row in rows} >= {"float32", "float64"}


def test_triton_kernels_spill_next_to_nothing_and_take_few_registers(triton_kernels):
    for kernel in triton_kernels:
        name = (kernel["family"], kernel["kernel"])
        bound = TRITON_REGISTERS[name]
        assert kernel["spilled"] <= TRITON_SPILLED.get(name, 0), kernel
        assert 0 < kernel["registers"] <= bound, kernel
        assert kernel["shared"] <= TRITON_STAGED.get(kernel["family"], TRITON_SHARED), kernel


def test_pooling_leaves_room_for_programs(triton_kernels):
    """Twelve warps of the forward pass and 16 of the others where the published layout is pooled.

    So all programs that pool B 64 run at once on 132 multiprocessors.
    """
    rows = [row for row in triton_kernels if row["shape"].startswith("[4, 6, 128, 768,")]
    rows = [row for row in rows if row["family"] == "pool"]
    assert len(rows) > 10
    for row in rows:
        warps = 12 if row["kernel"] == "forward_kernel" else 16
        assert row["warps"] == (8 if row["kernel"] == "backward_kernel" else 4), row
        assert row["registers"] <= 65536 // (warps * 32), row
