"""Exported programs of warps and splines: saved, loaded, and the numbers compared."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import torch
from support import bitwise_equal, random
from torch import Tensor
from torch.export import Dim, export, load, save

import gsalign_kernels as kernels

IMPLEMENTATIONS = ["reference", "cpp"]


def points(*batch: int, seed: int) -> Tensor:
    corners = torch.tensor([[-1.0, -1.0], [1.0, -0.9], [-0.8, 1.0], [0.9, 1.1], [0.1, 0.2]])
    return corners + 0.1 * random(*batch, 5, 2, seed=seed, dtype=torch.float32).clamp(-1, 1)


class WarpImage(torch.nn.Module):
    """Solve, grid and sampling, with settings that are not the defaults."""

    def __init__(self, implementation: str) -> None:
        super().__init__()
        self.implementation = implementation

    def forward(self, image: Tensor, control_points: Tensor, values: Tensor) -> Tensor:
        return kernels.warp_image(
            image, control_points, values, size=(6, 5), padding_mode="reflection",
            align_corners=False, implementation=self.implementation,
        )  # fmt: skip


class WarpTokens(torch.nn.Module):
    """As a layer has it: the basis is a buffer, the source points are a parameter."""

    def __init__(self, implementation: str) -> None:
        super().__init__()
        self.implementation = implementation
        self.source = torch.nn.Parameter(0.9 * points(seed=1))
        self.register_buffer("basis", kernels.tps_basis(points(seed=2), (4, 3)))

    def forward(self, tokens: Tensor, angle: Tensor) -> Tensor:
        return kernels.warp_tokens(
            tokens, self.source, angle, self.basis, size=(4, 3), eta=0.3, prefix=1,
            implementation=self.implementation,
        )  # fmt: skip


class Grid(torch.nn.Module):
    """A grid from splines solved on the way, and the map of a basis made on the way."""

    def __init__(self, implementation: str) -> None:
        super().__init__()
        self.implementation = implementation

    def forward(self, control_points: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        settings = {"align_corners": False, "implementation": self.implementation}
        coefficients = kernels.tps_solve(control_points, values, implementation=self.implementation)
        grid = kernels.tps_grid(coefficients, control_points, (4, 6), **settings)
        return grid, kernels.tps_basis(control_points[0], (4, 6), **settings) @ values


def arguments(module: torch.nn.Module, batch: int) -> tuple[Tensor, ...]:
    if isinstance(module, WarpTokens):
        return random(batch, 13, 16, seed=3, dtype=torch.float32), random(
            batch, seed=4, dtype=torch.float32
        )
    splines = points(batch, seed=5), 0.8 * points(batch, seed=6)
    if isinstance(module, Grid):
        return splines
    return random(batch, 3, 7, 8, seed=7, dtype=torch.float32), *splines


OPERATORS = {WarpImage: "warp_image", WarpTokens: "warp_tokens", Grid: "tps_grid"}
MODULES = [
    pytest.param(kind, implementation, id=f"{OPERATORS[kind]}-{implementation}")
    for kind in OPERATORS
    for implementation in IMPLEMENTATIONS
]


def results(outcome: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outcome if isinstance(outcome, tuple) else (outcome,)


@pytest.mark.parametrize(("kind", "implementation"), MODULES)
@pytest.mark.parametrize("strict", [False, True])
def test_numbers_after_loading(kind, implementation, strict):
    module = kind(implementation)
    given = arguments(module, 3)
    program = export(module, given, strict=strict)
    kept = any(f"gsalign.{OPERATORS[kind]}" in str(node.target) for node in program.graph.nodes)
    assert kept == (implementation == "cpp")
    file = io.BytesIO()
    save(program, file)
    file.seek(0)
    loaded = load(file).module()
    other = tuple(t + 0.05 for t in given)  # not the figures it was exported with
    for one, two in zip(results(loaded(*other)), results(module(*other)), strict=True):
        assert bitwise_equal(one, two)


@pytest.mark.parametrize(("kind", "implementation"), MODULES)
def test_the_batch_may_vary(kind, implementation):
    module = kind(implementation)
    given = arguments(module, 3)
    batch = Dim("batch", min=2, max=64)
    shapes = tuple({0: batch} for _ in given)
    loaded = export(module, given, dynamic_shapes=shapes).module()
    for size in (2, 7):
        other = arguments(module, size)
        for one, two in zip(results(loaded(*other)), results(module(*other)), strict=True):
            assert bitwise_equal(one, two)


def test_numbers_in_another_process(tmp_path):
    """There the operators are defined by importing gsalign_kernels, before loading."""
    for kind, name in OPERATORS.items():
        module = kind("cpp")
        given = arguments(module, 2)
        save(export(module, given), tmp_path / f"{name}.pt2")
        torch.save([given, results(module(*given))], tmp_path / f"{name}.pt")
    code = """
import sys, pathlib, torch, gsalign_kernels
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.pt2")):
    given, wanted = torch.load(path.with_suffix(".pt"), weights_only=True)
    actual = torch.export.load(path).module()(*given)
    actual = actual if isinstance(actual, tuple) else (actual,)
    assert all(map(torch.equal, actual, wanted)), path
    print(path.stem)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == sorted(OPERATORS.values())
