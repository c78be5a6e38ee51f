"""Rows: what a measurement says, under which conditions, and the CSV that keeps it."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path

import torch

from gsalign.files import atomic_write
from gsalign.provenance import commit_here, device_name
from gsalign_kernels import kernel_report

ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
"""glibc keeps freed memory instead of giving blocks over 32 MB back at every free."""


@dataclass(frozen=True)
class Conditions:
    """What is the same for every row of a run."""

    device: str
    threads: int
    allocator: str
    torch: str
    triton: str
    cuda: str
    commit: str
    date: str


@dataclass(frozen=True)
class Row:
    """One line of the CSV; what does not apply or was not measured is None, an empty field.

    Attributes:
        op: public name of the operator, or the model.
        implementation: provider; ``copy`` is the yardstick timed beside a case.
        pass_name: ``forward``, ``forward+backward``, ``embed`` or ``training step``.
        dtype: type of the features.
        shape: sizes in words.
        p20_ms: a fifth of the calls took less. On CUDA operators are timed inside a CUDA graph, the
            device's time alone, unless the note says why there is none.
        p50_ms: median.
        p80_ms: a fifth of the calls took longer.
        launched_ms: on CUDA the median of calls launched one by one, with what the host takes.
        gb_per_s: counted minimal bytes over the median, 1e9 bytes per second.
        copy_fraction: that over the copy's, measured in the same rounds.
        images_per_s: for models.
        peak_mib: device memory of one call above what its inputs hold (CUDA only).
        error: largest relative error (2-norm) of a result against the reference in float64.
        calls: how many calls the percentiles are of.
        note: why it was not measured, or what to know.
    """

    op: str
    implementation: str
    pass_name: str
    dtype: str
    shape: str
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    launched_ms: float | None = None
    gb_per_s: float | None = None
    copy_fraction: float | None = None
    images_per_s: float | None = None
    peak_mib: float | None = None
    error: float | None = None
    calls: int | None = None
    note: str = ""


RENAMED = {"pass_name": "pass"}
COLUMNS = tuple(
    RENAMED.get(field.name, field.name)
    for field in (*fields(Row)[:-1], *fields(Conditions), fields(Row)[-1])
)


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_csv(path: Path, rows: Iterable[Row], conditions: Conditions) -> None:
    """Writes all rows with the conditions of the run; a reader sees the old file or the new."""
    common = asdict(conditions)
    with atomic_write(path) as temporary, temporary.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            cells = {RENAMED.get(k, k): v for k, v in asdict(row).items()} | common
            writer.writerow({name: _text(value) for name, value in cells.items()})


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows as written, all text.

    Raises:
        ValueError: the file has other columns.
    """
    with path.open(newline="") as stream:
        reader = csv.DictReader(stream)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: wanted the columns {', '.join(COLUMNS)}")
        return list(reader)


def slug(name: str) -> str:
    """A device's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def allocator_in_force() -> str:
    """How this process's memory is kept, judged by its environment."""
    if all(os.environ.get(name) == value for name, value in ALLOCATOR.items()):
        return "glibc, heap kept"
    return "as the system has it"


def conditions_here(device: torch.device) -> Conditions:
    """The conditions of this run."""
    versions = kernel_report().versions
    return Conditions(
        device=device_name(device),
        threads=torch.get_num_threads(),
        allocator="CUDA caching" if device.type == "cuda" else allocator_in_force(),
        torch=versions["torch"],
        triton=versions["triton"],
        cuda=versions["cuda"],
        commit=commit_here(),
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    )
