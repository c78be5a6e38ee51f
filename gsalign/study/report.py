"""The summary of a study as tables: for the console, and as a page in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich.table import Table

from gsalign.evaluation.protocols import protocol_title
from gsalign.study.config import StudyConfig
from gsalign.study.rows import StudyRow
from gsalign.study.summary import Spread, Summary, summarise
from gsalign.tables import plain_table

NOTE = (
    "Mean ± standard deviation over the seeds, in percent, at the end of training. Δ: less the "
    "baseline of the same seed, mean ± standard deviation of these differences; * where the 95 % "
    "confidence interval of their mean (Student's t, for each figure alone) leaves out 0."
)


def summaries_of(study: StudyConfig, rows: Sequence[StudyRow]) -> list[Summary]:
    """The summaries that a study reports."""
    return summarise(
        rows, baseline=study.baseline_name, metrics=study.metrics, protocols=study.protocols
    )


def report_tables(study: StudyConfig, rows: Sequence[StudyRow]) -> list[Table]:
    """One table per protocol, a row per variant."""
    tables = []
    for protocol, summaries in _by_protocol(study, rows):
        table = plain_table(_title(protocol, rows), ["variant"], _headings(study))
        for summary in summaries:
            # Without blanks three figures and their gains fit into 80 columns.
            table.add_row(summary.variant, *(c.replace(" ", "") for c in _cells(study, summary)))
        tables.append(table)
    return tables


def markdown_report(study: StudyConfig, rows: Sequence[StudyRow]) -> str:
    """The report as a page: what was run, a table per protocol, and what made it."""
    final = [row for row in rows if row.is_final]
    lines = [f"# Study {study.name}", ""]
    if study.about:
        lines += [study.about.strip(), ""]
    lines += ["| variant | what it is |", "| --- | --- |"]
    lines += [f"| {_bar(name)} | {_bar(v.about)} |" for name, v in study.variants.items()]
    lines += ["", NOTE]
    for protocol, summaries in _by_protocol(study, rows):
        headings = ("variant", *_headings(study))
        lines += ["", f"## {_title(protocol, rows)}", "", _line(headings)]
        lines.append(_line(["---", *("---:" for _ in headings[1:])]))
        lines += [_line((summary.variant, *_cells(study, summary))) for summary in summaries]
    return "\n".join([*lines, "", *_provenance(final), ""])


def _by_protocol(
    study: StudyConfig, rows: Sequence[StudyRow]
) -> Iterable[tuple[str, list[Summary]]]:
    grouped: dict[str, list[Summary]] = {}
    for summary in summaries_of(study, rows):
        grouped.setdefault(summary.protocol, []).append(summary)
    return grouped.items()


def _title(protocol: str, rows: Sequence[StudyRow]) -> str:
    counts = {row.valid_queries for row in rows if row.protocol == protocol}
    told = " or ".join(f"{count:,}" for count in sorted(counts))
    return f"{protocol_title(protocol)}, {told} queries"


def _headings(study: StudyConfig) -> tuple[str, ...]:
    return ("seeds", *study.metrics, *(f"Δ {metric}" for metric in study.metrics))


def _cells(study: StudyConfig, summary: Summary) -> tuple[str, ...]:
    figures = [summary.figures[metric] for metric in study.metrics]
    gains = [summary.gains.get(metric) for metric in study.metrics]
    return (
        str(max(figure.count for figure in figures)),
        *(_plain(figure) for figure in figures),
        *("" if gain is None else _signed(gain) for gain in gains),
    )


def _plain(value: Spread) -> str:
    return "-" if not value.count else f"{value.mean:.1f}{_deviation(value)}"


def _signed(value: Spread) -> str:
    if not value.count:
        return "-"
    star = " *" if value.differs_from_zero else ""
    return f"{value.mean:+.1f}{_deviation(value)}{star}"


def _deviation(value: Spread) -> str:
    return "" if math.isnan(value.std) else f" ± {value.std:.1f}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(map(_bar, cells))} |"


def _bar(cell: str) -> str:
    return " ".join(cell.split()).replace("|", "\\|")


def _provenance(final: Sequence[StudyRow]) -> list[str]:
    """What made the figures; where runs differ in it, all of it."""
    if not final:
        return ["No run has finished."]

    def all_of(name: str) -> str:
        return ", ".join(dict.fromkeys(str(getattr(row, name)) for row in final))

    seconds = {(row.variant, row.seed): row.seconds for row in final}
    return [
        f"{len(seconds)} runs of {all_of('steps')} steps, {min(seconds.values()):.0f} to "
        f"{max(seconds.values()):.0f} s of training each. Machine: {all_of('machine')}. GSAlign "
        f"{all_of('gsalign')}, commit {all_of('commit')}; PyTorch {all_of('torch')}."
    ]
