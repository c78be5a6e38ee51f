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

from gsalign_kernels.triton import warp, warp_kernels

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
}
OPTIONS = ("num_warps", "num_stages")
# Batch, map, prefix, channels, control points. The published layout; vectors that no 16 divides;
# one channel, which Triton compiles in as a constant; a small map with many control points.
LAUNCHES = [
    (torch.bfloat16, 4, (16, 8), 2, 768, 4),
    (torch.float32, 4, (16, 8), 2, 768, 4),
    (torch.float16, 2, (16, 8), 1, 50, 9),
    (torch.float32, 2, (3, 2), 0, 1, 36),
]


class Recorder:
    """Stands in for the module of kernels and keeps what would have been launched."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(warp_kernels, name)

        class Launcher:
            def __getitem__(_, grid: tuple[int, ...]) -> Any:
                return lambda *args, **options: self.launches.append((kernel, args, options))

        return Launcher()


def record(dtype, batch, size, prefix, channels, points) -> Recorder:
    """The launches of a forward and a backward pass."""
    recorder = Recorder()
    warp._kernels = lambda: recorder
    warp.unavailable = lambda device: None
    queries = size[0] * size[1]
    tokens = torch.zeros(batch, prefix + queries, channels, dtype=dtype)
    rest = (torch.zeros(points, 2), torch.zeros(batch), torch.zeros(queries, points))
    warp.warp_tokens(tokens, *rest, *size, 0.3, prefix)
    warp.warp_tokens_backward(tokens, tokens, *rest, *size, 0.3, prefix)
    return recorder


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
            signature[name] = "fp32"
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
    for dtype, *shape in LAUNCHES:
        for launch in record(dtype, *shape).launches:
            source, compiler_options = source_of(*launch)
            variant = (source.hash(), compiler_options["num_warps"])
            if variant in seen:
                continue
            seen.add(variant)
            name = {"kernel": source.name, "dtype": str(dtype).removeprefix("torch.")}
            name["channels"] = shape[3]
            table += [name | compile_for(source, compiler_options, target) for target in targets]
    print(json.dumps(table))


if __name__ == "__main__":
    main([int(target) for target in sys.argv[1:]])
