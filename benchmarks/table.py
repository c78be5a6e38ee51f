"""The table a person reads at the end of a run: medians, and ratios to the eager reference."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.case import REFERENCE
from benchmarks.measure import COPY
from benchmarks.rows import Conditions, Row


def ratios(rows: Sequence[Row]) -> dict[Row, float]:
    """How many times as fast as the eager reference each measured row is."""

    def key(row: Row) -> tuple[str, ...]:
        return row.op, row.shape, row.dtype, row.pass_name

    eager = {key(row): row.p50_ms for row in rows if row.implementation == REFERENCE}
    found = {}
    for row in rows:
        reference = eager.get(key(row))
        if row.p50_ms and reference:
            found[row] = reference / row.p50_ms
    return found


def show(rows: Sequence[Row], conditions: Conditions, console: Console) -> None:
    """Prints the measured rows, then who was not measured and why."""
    table = Table(title=f"{conditions.device}, {conditions.threads} threads", title_justify="left")
    table.add_column("operator and implementation", min_width=60, no_wrap=True)
    for name in (
        "p50 ms",
        "p20 - p80",
        "launched",
        "x eager",
        "GB/s",
        "of copy",
        "images/s",
        "error",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    times = ratios(rows)
    last = ""
    for row in rows:
        if row.p50_ms is None or row.p20_ms is None or row.p80_ms is None:
            continue
        title = f"{row.op} {row.shape} {row.dtype} {row.pass_name}"
        if title != last:
            table.add_section()
            table.add_row(title, style="bold")
        table.add_row(
            f"  {row.implementation}",
            f"{row.p50_ms:.3g}",
            f"{row.p20_ms:.3g} - {row.p80_ms:.3g}",
            f"{row.launched_ms:.3g}" if row.launched_ms else "",
            f"{times[row]:.2f}" if row in times and row.implementation != COPY else "",
            f"{row.gb_per_s:.2f}" if row.gb_per_s else "",
            f"{row.copy_fraction:.2f}" if row.copy_fraction else "",
            f"{row.images_per_s:.1f}" if row.images_per_s else "",
            f"{row.error:.1e}" if row.error is not None else "",
        )
        last = title
    console.print(table)
    for row in rows:
        if row.p50_ms is None:
            where = f" {row.shape} {row.dtype}" if row.shape else ""
            console.print(f"{row.op}{where}: {row.implementation} {row.note}", highlight=False)
