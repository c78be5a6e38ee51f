"""Which implementation can serve a call, why another cannot, and which one does.

A choice can be made in four places; the first that is set decides:

1. the ``implementation=`` argument of an operator,
2. the context manager :func:`use_kernels` (the command line's ``--kernels`` uses it),
3. the environment variable ``GSALIGN_KERNELS``, read once when the package is imported,
4. ``auto``: the first of :data:`AUTOMATIC_ORDER` that can run.

An argument that names an implementation which cannot run is an error. The two wide choices (2, 3)
hold for every operator that has such an implementation at all; an operator that has none in this
version is served automatically, and :func:`kernel_report` shows where.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

import torch

from gsalign_kernels import native
from gsalign_kernels.errors import KernelUnavailableError

IMPLEMENTATIONS = ("reference", "cpp", "cuda", "triton")
CHOICES = ("auto", *IMPLEMENTATIONS)

AUTOMATIC_ORDER = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}
"""What ``auto`` tries, by device type. On other devices only the reference can run."""


def _triton_version() -> str:
    """Version of the installed Triton, by either name that it is distributed under."""
    for name in ("triton", "pytorch-triton"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def _major_and_minor(version: str) -> tuple[int, int]:
    """Of a version as ``3.8.0+git1``; (0, 0) of one that has none."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


_TRITON_INSTALLED = find_spec("triton") is not None
_TRITON_VERSION = _major_and_minor(_triton_version())
_TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")

_fused: dict[str, tuple[str, ...]] = {}
_without_float64: dict[str, tuple[str, ...]] = {}
_only_by_name: dict[str, tuple[str, ...]] = {}
_least_triton: dict[str, tuple[int, int]] = {}


def declare(
    operator: str,
    *fused: str,
    without_float64: tuple[str, ...] = (),
    only_by_name: tuple[str, ...] = (),
    least_triton: tuple[int, int] = (0, 0),
) -> None:
    """Say which implementations beside the reference an operator has in this version.

    Args:
        operator: public operator name.
        fused: its implementations.
        without_float64: those of them that take no float64 features.
        only_by_name: those of them that ``auto`` leaves alone.
        least_triton: the oldest Triton whose code for the operator was looked at.
    """
    _fused[operator] = fused
    _without_float64[operator] = without_float64
    _only_by_name[operator] = only_by_name
    _least_triton[operator] = least_triton


def fused_implementations(operator: str) -> tuple[str, ...]:
    """The implementations beside the reference that an operator has in this version."""
    return _fused[operator]


def _checked_choice(source: str, choice: str) -> str:
    if choice not in CHOICES:
        raise ValueError(f"{source}: wanted one of {', '.join(CHOICES)}, got {choice!r}")
    return choice


# Plain module variables, read at every call: torch.compile guards on them, so a compiled model
# follows a later use_kernels().
_environment = _checked_choice("GSALIGN_KERNELS", os.environ.get("GSALIGN_KERNELS") or "auto")
_context: str | None = None


def choice_in_force() -> str:
    """What ``use_kernels`` or the environment asks for: ``"auto"`` or an implementation."""
    return _context if _context is not None else _environment


def reason_against(
    operator: str, implementation: str, device_type: str, dtype: torch.dtype | None = None
) -> str | None:
    """Why an implementation cannot serve an operator on a kind of device; None when it can.

    Args:
        operator: public operator name, as ``"warp_tokens"``.
        implementation: ``"reference"``, ``"cpp"``, ``"cuda"`` or ``"triton"``.
        device_type: type of the tensors' device, as ``"cpu"`` or ``"cuda"``.
        dtype: type of the features, where it matters.
    """
    if implementation == "reference":
        return None
    if implementation not in _fused[operator]:
        return f"this operator has no {implementation} implementation in this version"
    if dtype == torch.float64 and implementation in _without_float64[operator]:
        return f"its {implementation} implementation takes no float64"
    if implementation == "cpp":
        if device_type != "cpu":
            return f"cpp runs on CPU tensors, these are on {device_type}"
        return native.cpu_reason
    if implementation == "cuda":
        if native.cuda_reason is not None:
            return native.cuda_reason
        if device_type != "cuda":
            return f"cuda runs on CUDA tensors, these are on {device_type}"
        return None
    if not _TRITON_INSTALLED:
        return "triton is not installed"
    if device_type != "cuda" and not (device_type == "cpu" and _TRITON_INTERPRETED):
        return (
            f"triton runs on CUDA tensors, these are on {device_type} "
            "(set TRITON_INTERPRET=1 before importing to interpret its kernels on the CPU)"
        )
    if device_type == "cuda" and _TRITON_VERSION < _least_triton[operator]:
        found, least = (".".join(map(str, v)) for v in (_TRITON_VERSION, _least_triton[operator]))
        return (
            f"what triton {found} compiles it to was never looked at and may be very slow; "
            f"install {least} or newer"
        )
    return None


def _runnable(operator: str, device_type: str, dtype: torch.dtype | None) -> list[str]:
    return [
        name for name in IMPLEMENTATIONS if not reason_against(operator, name, device_type, dtype)
    ]


def select(
    operator: str,
    device: torch.device,
    implementation: str | None,
    dtype: torch.dtype | None = None,
) -> str:
    """The implementation that serves this call.

    Args:
        operator: public operator name.
        device: where the tensors are.
        implementation: the caller's ``implementation=`` argument.
        dtype: type of the features, where an implementation does not take every one.

    Raises:
        ValueError: ``implementation`` is no known name.
        KernelUnavailableError: the named implementation cannot run; says why and what can.
    """
    choice = implementation
    if choice is not None:
        _checked_choice("implementation", choice)
    else:
        choice = choice_in_force()
        if choice not in ("auto", "reference") and choice not in _fused[operator]:
            choice = "auto"
        if choice == "triton" and _TRITON_VERSION < _least_triton[operator]:
            choice = "auto"
    device_type = device.type
    if choice == "auto":
        for name in AUTOMATIC_ORDER.get(device_type, ()):
            if name in _only_by_name[operator]:
                continue
            if reason_against(operator, name, device_type, dtype) is None:
                return name
        return "reference"
    reason = reason_against(operator, choice, device_type, dtype)
    if reason is not None:
        raise KernelUnavailableError(
            f"{operator}: {choice} cannot run: {reason}. "
            f"What can: {', '.join(_runnable(operator, device_type, dtype))}"
        )
    return choice


def device_of(implementation: str) -> str:
    """The device type an implementation would be used on, on this machine."""
    if implementation == "cpp" or (implementation == "triton" and _TRITON_INTERPRETED):
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "cpu"


def reason_here(operator: str, implementation: str) -> str | None:
    """Why no tensor on this machine can be served, as for want of a GPU; None when some can."""
    reason = reason_against(operator, implementation, device_of(implementation))
    if reason is not None and "these are on" in reason:
        return "no CUDA device is visible"
    return reason


@contextmanager
def use_kernels(choice: str) -> Iterator[None]:
    """Choose the implementation of every operator called inside the block.

    Holds for the whole process, not for one thread. Blocks nest; leaving one restores the choice
    around it. Operators without the named implementation are served automatically.

    Args:
        choice: ``"auto"``, ``"reference"``, ``"cpp"``, ``"cuda"`` or ``"triton"``.

    Raises:
        ValueError: an unknown choice.
        KernelUnavailableError: no operator can run it on this machine; says why and what can.

    Example:
        >>> with use_kernels("reference"):
        ...     embeddings = model.embed(images)
    """
    global _context
    _checked_choice("use_kernels", choice)
    if choice not in ("auto", "reference"):
        having = [operator for operator in _fused if choice in _fused[operator]]
        reasons = {operator: reason_here(operator, choice) for operator in having}
        if all(reasons.values()):
            runnable = ["auto", "reference"]
            for name in ("cpp", "cuda", "triton"):
                if any(name in _fused[op] and not reason_here(op, name) for op in _fused):
                    runnable.append(name)
            raise KernelUnavailableError(
                f"kernels {choice!r} cannot run on this machine: {next(iter(reasons.values()))}. "
                f"What can: {', '.join(runnable)}"
            )
    outer = _context
    _context = choice
    try:
        yield
    finally:
        _context = outer


@dataclass(frozen=True)
class KernelReport:
    """What can serve what on this machine, and why not.

    Attributes:
        table: per operator and implementation ``None`` when it can run, else the reason.
        automatic: per operator what ``auto`` takes on this machine's best device.
        versions: Python, PyTorch, CUDA, Triton.
        build: what the installation compiled, see :func:`gsalign_kernels.native.build_report`.
        choice: the choice now in force outside any ``implementation=`` argument.
    """

    table: dict[str, dict[str, str | None]]
    automatic: dict[str, str]
    versions: dict[str, str]
    build: dict[str, object]
    choice: str

    def __str__(self) -> str:
        """The report as a plain-text table followed by the reasons."""
        width = max(len(operator) for operator in self.table)
        lines = [f"{'operator':{width}}  " + "".join(f"{n:11}" for n in IMPLEMENTATIONS) + "auto"]
        notes: list[str] = []
        for operator, row in self.table.items():
            cells = []
            for name in IMPLEMENTATIONS:
                reason = row[name]
                if reason is None:
                    cells.append("yes")
                else:
                    if reason not in notes:
                        notes.append(reason)
                    cells.append(f"no ({notes.index(reason) + 1})")
            body = "".join(f"{cell:11}" for cell in cells)
            lines.append(f"{operator:{width}}  {body}{self.automatic[operator]}")
        lines += [f"({index + 1}) {note}" for index, note in enumerate(notes)]
        lines.append(f"choice in force: {self.choice}")
        lines.append(", ".join(f"{name} {value}" for name, value in self.versions.items()))
        return "\n".join(lines)


def kernel_report() -> KernelReport:
    """What can serve what on this machine, and why not.

    Returns:
        A :class:`KernelReport`; ``print`` it for a table.
    """
    table = {
        operator: {name: reason_here(operator, name) for name in IMPLEMENTATIONS}
        for operator in _fused
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    automatic = {operator: select(operator, device, "auto") for operator in _fused}
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "triton": _triton_version() if _TRITON_INSTALLED else "none",
    }
    return KernelReport(table, automatic, versions, native.build_report(), choice_in_force())
