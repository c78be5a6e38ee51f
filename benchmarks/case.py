"""What is measured: a case (one operator, shape and type) and the providers that can compute it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from shutil import which
from typing import Any

import torch
from torch import Tensor

from gsalign_kernels import backends

Tensors = dict[str, Tensor]
Outputs = tuple[Tensor, ...]

FORWARD = "forward"
BACKWARD = "backward"
BOTH = "forward+backward"
PASSES = (FORWARD, BACKWARD, BOTH)

REFERENCE = "reference"
DTYPE_NAMES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Attributes:
        name: what the row calls it.
        run: from the case's tensors to a tuple of outputs.
        unavailable: why it cannot run here; None when it can.
        ours: whether it is a fused implementation of this project.
        slack: factor on the case's tolerance, for one that computes in a coarser way.
        note: what a reader must know to compare it.
        passes: those it can be measured in.
    """

    name: str
    run: Callable[[Tensors], Outputs]
    unavailable: str | None = None
    ours: bool = False
    slack: float = 1.0
    note: str = ""
    passes: tuple[str, ...] = PASSES


@dataclass(frozen=True)
class Choice:
    """What the person at the keyboard wants measured.

    Attributes:
        device: where.
        quick: small batches and few rounds, to see that everything runs.
        compile: whether ``torch.compile`` is among the providers.
        full: whether the published model's size is measured beside the demo's.
    """

    device: torch.device
    quick: bool = False
    compile: bool = True
    full: bool = False


@dataclass(frozen=True)
class Case:
    """One operator at one shape and type, with everything that can compute it.

    Attributes:
        op: public name of the operator.
        shape: the sizes in words, as the row shows them.
        dtype: type of the features; coordinates and masks stay float32.
        inputs: makes the tensors on a device; the same figures at every call.
        leaves: names of the inputs that get gradients.
        reference: the specification. In float64 it is the judge of every provider.
        providers: who computes it, the eager reference first.
        tolerance: largest relative error of a result in the norm; None for that of the type.
        passes: what is measured; the backward pass alone only where its bandwidth is of interest.
    """

    op: str
    shape: str
    dtype: torch.dtype
    inputs: Callable[[torch.device], Tensors]
    leaves: tuple[str, ...]
    reference: Callable[[Tensors], Outputs]
    providers: tuple[Provider, ...]
    tolerance: float | None = None
    passes: tuple[str, ...] = (FORWARD, BOTH)


def implementations(
    op: str, device: torch.device, call: Callable[[Tensors, str], Outputs]
) -> list[Provider]:
    """Our fused implementations of an operator, each with the reason why it cannot run, or None.

    Args:
        op: public name of the operator.
        device: where the tensors will be.
        call: runs the operator on tensors with ``implementation=`` a given name.
    """
    providers = []
    for name in backends.IMPLEMENTATIONS:
        if name == REFERENCE:
            continue

        def run(tensors: Tensors, _name: str = name) -> Outputs:
            return call(tensors, _name)

        reason = backends.reason_against(op, name, device.type)
        if reason is None and name == "triton" and device.type == "cpu":
            reason = "the Triton interpreter's time says nothing about Triton"
        providers.append(Provider(name, run, unavailable=reason, ours=True))
    return providers


def eager(run: Callable[[Tensors], Outputs], *, note: str = "") -> Provider:
    """The eager reference, which every ratio is taken to."""
    return Provider(REFERENCE, run, note=note)


def compiled(
    run: Callable[[Tensors], Outputs],
    device: torch.device,
    *,
    enabled: bool,
    name: str = "torch.compile",
    note: str = "",
) -> Provider:
    """``torch.compile`` of a plain PyTorch function; compiled at the first call, never timed."""
    reason = None
    if not enabled:
        reason = "left out by --no-compile or --quick"
    elif device.type == "cpu" and which("g++") is None and which("clang++") is None:
        reason = "torch.compile for the CPU needs a C++ compiler and none was found"
    elif device.type == "cuda" and not backends._TRITON_INSTALLED:
        reason = "torch.compile for CUDA needs triton, which is not installed"
    program: list[Any] = []

    def run_compiled(tensors: Tensors) -> Outputs:
        if not program:
            program.append(torch.compile(run, dynamic=False))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return program[0](tensors)

    # A compiled backward pass gives its saved tensors away, so it cannot run twice on one graph.
    return Provider(name, run_compiled, unavailable=reason, note=note, passes=(FORWARD, BOTH))


def normal(*shape: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Normal figures from a seed, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)


def uniform(*shape: int, seed: int, device: torch.device) -> Tensor:
    """Uniform float32 figures in [0, 1) from a seed, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator).to(device)


def control_lattice(side: int) -> Tensor:
    """A regular lattice of ``side**2`` control points ``(x, y)`` in [-1, 1], column-major."""
    axis = torch.linspace(-1.0, 1.0, side)
    x, y = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y], dim=-1).reshape(-1, 2)


def jittered_lattice(
    batch: int, count: int, *, seed: int, device: torch.device, jitter: float = 0.25
) -> Tensor:
    """``[batch, count, 2]`` control points: a lattice, each point moved by a part of a cell.

    A lattice keeps the points apart, so that the systems are as well conditioned as those of
    points a person would place. ``jitter`` is in cells.
    """
    side = int(count**0.5)
    while side * side < count:
        side += 1
    cell = 2.0 / max(side - 1, 1)
    points = control_lattice(side)[:count].to(device)
    moves = uniform(batch, count, 2, seed=seed, device=device) * 2.0 - 1.0
    return points + jitter * cell * moves
