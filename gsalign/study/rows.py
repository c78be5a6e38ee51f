"""The table of a study: one row per run, protocol and evaluation."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from gsalign.csv_rows import csv_rows
from gsalign.engine.metrics import Record, read_metrics
from gsalign.errors import DataError
from gsalign.files import atomic_write
from gsalign.study.config import Metric
from gsalign.study.plan import StudyRun
from gsalign.study.state import origin_of

METRICS: tuple[str, ...] = get_args(Metric)
_TEXTS = ("variant", "protocol", "data", "gsalign", "torch", "commit", "machine")
_NUMBERS = ("seed", "step", "steps", "valid_queries")
COLUMNS = (
    *("variant", "seed", "protocol", "step", "steps", *METRICS, "valid_queries", "seconds"),
    *("data", "gsalign", "torch", "commit", "machine"),
)


@dataclass(frozen=True)
class StudyRow:
    """What one evaluation of one run gave by one protocol.

    Attributes:
        variant: name of the variant.
        seed: of the run.
        protocol: its name.
        step: iterations done.
        steps: iterations of the whole run.
        figures: Rank-1, Rank-5, Rank-10, mAP, mINP and metric in percent; NaN if no query is
            valid.
        valid_queries: queries that the figures are means over.
        seconds: training until then, without evaluations.
        data: fingerprint of the generated set; empty for another.
        gsalign, torch: versions.
        commit: of this library, ``unknown`` outside a checkout.
        machine: GPU, or processor and number of cores.
    """

    variant: str
    seed: int
    protocol: str
    step: int
    steps: int
    figures: dict[str, float]
    valid_queries: int
    seconds: float
    data: str
    gsalign: str
    torch: str
    commit: str
    machine: str

    @property
    def is_final(self) -> bool:
        """Whether the run had ended."""
        return self.step == self.steps


def collect_rows(runs: Iterable[StudyRun]) -> list[StudyRow]:
    """The rows of finished runs, in their order.

    Raises:
        DataError: what a run wrote is missing or damaged.
    """
    return [row for run in runs for row in _rows_of(run)]


def _rows_of(run: StudyRun) -> Iterator[StudyRow]:
    origin = origin_of(run)
    try:
        records = read_metrics(run.folder.metrics)
    except FileNotFoundError:
        raise DataError(
            f"{run.folder.root} has weights but no {run.folder.metrics.name}: remove the folder to "
            "run it again"
        ) from None
    tests = [r for r in records if r["kind"] == "evaluation" and r["split"] == "test"]
    for test in tests:
        for protocol, figures in test["protocols"].items():
            yield StudyRow(
                variant=run.variant,
                seed=run.seed,
                protocol=protocol,
                step=test["iteration"],
                steps=tests[-1]["iteration"],
                figures={name: _number(figures[name]) for name in METRICS},
                valid_queries=figures["valid_queries"],
                seconds=round(_training_seconds(records, test["iteration"]), 1),
                **{name: origin[name] for name in ("data", "gsalign", "torch", "commit")},
                machine=origin["machine"],
            )


def _training_seconds(records: Iterable[Record], step: int) -> float:
    """Seconds of training until an iteration, summed over the stretches of the log."""
    seconds, before = 0.0, 0
    for record in records:
        if record["kind"] == "train" and record["iteration"] <= step:
            seconds += record["time"] * (record["iteration"] - before)
            before = record["iteration"]
    return seconds


def write_rows(path: Path, rows: Iterable[StudyRow]) -> None:
    """Write the table, atomically; figures in percent with four decimals, empty where NaN."""
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            values = {**vars(row), **{k: _text(v) for k, v in row.figures.items()}}
            writer.writerow([values[column] for column in COLUMNS])


def read_rows(path: Path) -> list[StudyRow]:
    """Read a table that :func:`write_rows` wrote.

    Raises:
        DataError: it is missing, or has other columns, or a cell is no number where one is wanted;
            the message names the line.
    """
    with csv_rows(path) as (heading, lines):
        if tuple(heading) != COLUMNS:
            raise DataError(f"{path} has other columns than a study: wanted {', '.join(COLUMNS)}")
        rows = []
        for number, cells in lines:
            named = dict(zip(COLUMNS, cells, strict=True))
            try:
                rows.append(_from_cells(named))
            except ValueError as error:
                raise DataError(f"{path}, line {number}: {error}") from None
    return rows


def _from_cells(cells: dict[str, str]) -> StudyRow:
    texts = {name: cells[name] for name in _TEXTS}
    numbers = {name: int(cells[name]) for name in _NUMBERS}
    figures = {name: float(cells[name] or "nan") for name in METRICS}
    # mypy cannot tell the columns of a mapping apart.
    return StudyRow(**texts, **numbers, figures=figures, seconds=float(cells["seconds"]))  # type: ignore[arg-type]


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _text(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"
