"""Compiles the Triton kernels of real launches for GPUs that need not be here.

    python compile_triton.py 80 90

The operators run with a recorder in place of their kernels, so that argument types, alignment and
block sizes are those of real launches. Prints one JSON list: per kernel and target its registers,
bytes spilled and bytes of static shared memory, by ptxas. Not a test: test_gpu_targets.py runs it
in a process of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gsalign_kernels.triton import (
    conv,
    conv_kernels,
    launch,
    pool,
    pool_kernels,
    prototype,
    prototype_kernels,
    tps,
    tps_kernels,
    tps_solve,
    tps_solve_kernels,
    warp_image,
    warp_image_kernels,
    warp_tokens,
    warp_tokens_kernels,
)

FAMILIES = {
    "warp_tokens": (warp_tokens, warp_tokens_kernels),
    "tps": (tps, tps_kernels),
    "tps_solve": (tps_solve, tps_solve_kernels),
    "warp_image": (warp_image, warp_image_kernels),
    "pool": (pool, pool_kernels),
    "prototype": (prototype, prototype_kernels),
    "conv": (conv, conv_kernels),
}
TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg")


def run_warp_tokens(dtype, batch, size, prefix, channels, points) -> None:
    """A forward and a backward pass of the token warp."""
    queries = size[0] * size[1]
    tokens = torch.zeros(batch, prefix + queries, channels, dtype=dtype)
    rest = (torch.zeros(points, 2), torch.zeros(batch), torch.zeros(queries, points))
    warp_tokens.warp_tokens(tokens, *rest, *size, 0.3, prefix)
    warp_tokens.warp_tokens_backward(tokens, tokens, *rest, *size, 0.3, prefix)


def run_tps(dtype, batch, size, points, columns, align_corners) -> None:
    """Splines at points and on a map, both passes."""
    count = size[0] * size[1]
    coefficients = torch.zeros(batch, points + 3, columns, dtype=dtype)
    control_points = torch.zeros(batch, points, 2, dtype=dtype)
    spline = (coefficients, control_points)
    where = torch.zeros(batch, count, 2, dtype=dtype)
    grad = torch.zeros(batch, count, columns, dtype=dtype)
    tps.tps_evaluate(*spline, where)
    tps.tps_evaluate_backward(grad, *spline, where)
    tps.tps_grid(*spline, *size, align_corners)
    grad = grad.view(batch, *size, columns)
    tps.tps_grid_backward(grad, *spline, align_corners)


def run_tps_solve(dtype, batch, points, columns) -> None:
    """A solve and its gradients."""
    control_points = torch.zeros(batch, points, 2, dtype=dtype)
    values = torch.zeros(batch, points, columns, dtype=dtype)
    solution = tps_solve.tps_solve(control_points, values, 0.1, False)
    tps_solve.tps_solve_backward(solution[0], solution[0], control_points, solution[1])


def run_warp_image(
    dtype, batch, channels, size, points, mode, padding, align_corners, last
) -> None:
    """A forward and a backward pass of the image warp, channels-last if ``last``."""
    image = torch.zeros(batch, channels, *size, dtype=dtype)
    grad = image
    if last:
        image = image.to(memory_format=torch.channels_last)
    spline = (torch.zeros(batch, points + 3, 2), torch.zeros(batch, points, 2))
    warp_image.warp_image(image, *spline, *size, mode, padding, align_corners)
    warp_image.warp_image_backward(grad, image, *spline, mode, padding, align_corners)


def run_pool(
    dtype, batch, parts, positions, channels, shared, mode, activation, background, visibility
) -> None:
    """A forward and a backward pass of the masked part pooling."""
    tokens = torch.zeros(batch, 1 + positions, channels, dtype=dtype)
    lengths = (parts + background, positions)
    masks = torch.zeros(lengths if shared else (batch, *lengths))
    settings = (1, mode, activation, background)
    pooled, seen, *kept = pool.masked_part_pool(tokens, masks, *settings, visibility, 1e-6)
    pool.masked_part_pool_backward(pooled, seen, tokens, masks, *kept, *settings, 1e-6)


def run_prototype(dtype, batch, channels) -> None:
    """A forward and a backward pass of the prototype loss."""
    features = torch.zeros(batch, channels, dtype=dtype)
    given = (features, features, torch.zeros(batch, dtype=torch.int64))
    alignment, entropy, *kept = prototype.masked_prototype_loss(*given)
    prototype.masked_prototype_loss_backward(alignment, entropy, *given, *kept)


def run_conv(dtype, batch, size, prefix, channels, outputs) -> None:
    """A forward pass of the convolution; the backward pass is PyTorch's."""
    tokens = torch.zeros(batch, prefix + size[0] * size[1], channels, dtype=dtype)
    weight = torch.zeros(outputs, channels, 3, 3)
    conv.conv_relu_mean(tokens, weight, torch.zeros(outputs), *size, prefix)


# Compiled for every target: the published layouts.
RUNS = [
    # Batch, map, prefix, channels, control points.
    (run_warp_tokens, torch.bfloat16, 4, (16, 8), 2, 768, 4),
    (run_warp_tokens, torch.float32, 4, (16, 8), 2, 768, 4),
    # Batch, map, control points, columns, align_corners.
    (run_tps, torch.float32, 4, (64, 32), 25, 2, True),
    (run_tps, torch.float64, 4, (64, 32), 25, 2, True),
    # Batch, control points, columns.
    (run_tps_solve, torch.float32, 4, 4, 2),
    (run_tps_solve, torch.float32, 4, 25, 512),
    (run_tps_solve, torch.float64, 4, 100, 2),
    (run_tps_solve, torch.float32, 1, 1000, 2),
    # Batch, channels, size, control points, mode, padding, align_corners, channels-last.
    (run_warp_image, torch.float32, 4, 3, (256, 128), 25, 0, 0, True, False),
    (run_warp_image, torch.bfloat16, 4, 64, (64, 32), 25, 0, 2, False, True),
    # Batch, parts, positions, channels, shared, mode, activation, background, visibility.
    (run_pool, torch.float32, 4, 6, 128, 768, False, 0, 0, False, 0),
    (run_pool, torch.bfloat16, 4, 6, 128, 768, False, 0, 0, False, 0),
    (run_pool, torch.bfloat16, 4, 6, 128, 768, False, 0, 1, True, 1),
    # Batch, size, prefix, channels, outputs.
    (run_conv, torch.float32, 2, (16, 8), 2, 768, 256),
    (run_conv, torch.bfloat16, 2, (16, 8), 2, 768, 256),
    # Batch, channels.
    (run_prototype, torch.float32, 128, 768),
]
# Compiled for one target, as each takes seconds: vectors that no 16 divides; one channel or column,
# which Triton compiles in as a constant; small maps with many control points; ways of the pooling.
RUNS_ONCE = [
    (run_warp_tokens, torch.float16, 2, (16, 8), 1, 50, 9),
    (run_warp_tokens, torch.float32, 2, (3, 2), 0, 1, 36),
    (run_tps, torch.float32, 4, (5, 3), 4, 5, False),
    (run_tps, torch.float64, 4, (5, 3), 4, 1, False),
    (run_warp_image, torch.float16, 2, 50, (33, 17), 9, 0, 2, True, False),
    (run_warp_image, torch.float32, 2, 1, (5, 3), 9, 1, 1, False, False),
    (run_conv, torch.float16, 2, (3, 5), 0, 21, 9),
    (run_prototype, torch.float32, 5, 1),
    (run_prototype, torch.float32, 5000, 301),
    (run_pool, torch.bfloat16, 4, 1, 128, 768, True, 1, 0, False, 0),
    (run_pool, torch.float16, 4, 8, 128, 768, False, 2, 2, False, 0),
    (run_pool, torch.float32, 4, 8, 128, 768, False, 2, 0, False, 0),
    (run_pool, torch.float32, 4, 33, 128, 768, True, 0, 1, False, 1),
    (run_pool, torch.float16, 2, 8, 19, 50, False, 1, 0, False, 0),
    (run_pool, torch.float32, 2, 8, 128, 769, True, 2, 2, False, 0),
]
ONCE = 90


class Recorder:
    """Stands in for a module of kernels and keeps what would have been launched."""

    def __init__(self, family: str, kernels: Any, launches: list[Any]) -> None:
        self.family, self.kernels, self.launches = family, kernels, launches

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(self.kernels, name)

        class Launcher:
            def __getitem__(_, grid: tuple[int, ...]) -> Any:
                return lambda *args, **options: self.launches.append(
                    (self.family, kernel, args, options)
                )

        return Launcher()


def record(run, dtype, *shape) -> list[Any]:
    """The launches of a run: family, kernel, arguments, options."""
    launches: list[Any] = []
    launch.unavailable = lambda device: None
    for family, (module, kernels) in FAMILIES.items():
        recorder = Recorder(family, kernels, launches)
        module._kernels = lambda recorder=recorder: recorder
    run(dtype, *shape)
    return launches


def source_of(kernel, args, options) -> tuple[ASTSource, dict[str, Any]]:
    """What a launch would compile: every integer 1 a constant, every 16 that divides told."""
    free = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    given = dict(zip(kernel.arg_names, args, strict=False))
    compiler_options = {name: options[name] for name in OPTIONS if name in options}
    given |= {name: value for name, value in options.items() if name not in OPTIONS}
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = given[name]
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = kernel.params[index].annotation_type or "fp32"
        elif kernel.params[index].is_constexpr or (value == 1 and name not in free):
            signature[name] = "constexpr"
            constants[name] = value
        else:
            signature[name] = "i32"
            if name not in free and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), compiler_options


def compile_for(
    source: ASTSource, compiler_options: dict[str, Any], capability: int
) -> dict[str, int]:
    """Compile for one target and tell what Triton's own call of ptxas said of it."""
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options=compiler_options)
    told = log.getvalue()
    registers = re.search(r"Used (\d+) registers", told)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", told)
    if registers is None or spills is None or not compiled.asm["cubin"]:
        raise RuntimeError(f"{source.name}: ptxas told nothing: {told!r}")
    return {
        "target": capability,
        "warps": compiled.metadata.num_warps,
        "shared": compiled.metadata.shared,
        "registers": int(registers[1]),
        "spilled": int(spills[1]) + int(spills[2]),
    }


def main(targets: list[int]) -> None:
    """Compile every launch once per target and print the table."""
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True  # a cached kernel would bring no log
    table, seen = [], set()
    once = [target for target in targets if target == ONCE]
    for wanted, (run, dtype, *shape) in [
        *((targets, row) for row in RUNS),
        *((once, row) for row in RUNS_ONCE),
    ]:
        for family, *launched in record(run, dtype, *shape):
            source, compiler_options = source_of(*launched)
            variant = (source.hash(), compiler_options["num_warps"])
            if variant in seen:
                continue
            seen.add(variant)
            name = {"family": family, "kernel": source.name, "shape": str(shape)}
            name["dtype"] = str(dtype).removeprefix("torch.")
            table += [name | compile_for(source, compiler_options, target) for target in wanted]
    print(json.dumps(table))


if __name__ == "__main__":
    main([int(target) for target in sys.argv[1:]])
