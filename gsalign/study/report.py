"""The summary of a study as tables: for the console, and as a page in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Sheet:
    """A table of the report: a row per variant, the first column its name."""

    title: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]


def sheets(study: StudyConfig, rows: Sequence[StudyRow]) -> list[Sheet]:
    """The tables of the report: the main figure by all protocols, then all figures by protocol."""
    summaries = summaries_of(study, rows)
    protocols = dict.fromkeys(summary.protocol for summary in summaries)
    each = [
        Sheet(
            title=_title(protocol, rows),
            headings=("variant", "seeds", *study.metrics, *(f"Δ {m}" for m in study.metrics)),
            rows=[(s.variant, *_cells(study, s)) for s in summaries if s.protocol == protocol],
        )
        for protocol in protocols
    ]
    return [*_overview(study, summaries), *each] if len(protocols) > 1 else each


def report_tables(study: StudyConfig, rows: Sequence[StudyRow]) -> list[Table]:
    """The tables for a console."""
    tables = []
    for sheet in sheets(study, rows):
        table = plain_table(sheet.title, sheet.headings[:1], sheet.headings[1:])
        for name, *cells in sheet.rows:
            # Without blanks three figures and their gains fit into 80 columns.
            table.add_row(name, *(cell.replace(" ", "") for cell in cells))
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
    for sheet in sheets(study, rows):
        lines += ["", f"## {sheet.title}", "", _line(sheet.headings)]
        lines.append(_line(["---", *("---:" for _ in sheet.headings[1:])]))
        lines += map(_line, sheet.rows)
    return "\n".join([*lines, "", *_provenance(final), ""])


def _overview(study: StudyConfig, summaries: Sequence[Summary]) -> list[Sheet]:
    """The main figure, and its gain, by variant and protocol."""
    metric = study.main_metric
    protocols = list(dict.fromkeys(summary.protocol for summary in summaries))
    found = {(summary.variant, summary.protocol): summary for summary in summaries}
    tables: dict[str, list[tuple[str, ...]]] = {metric: [], f"Δ {metric}": []}
    for variant in dict.fromkeys(summary.variant for summary in summaries):
        # A variant lacks the protocols that its data set lacks.
        mine = [found.get((variant, protocol)) for protocol in protocols]
        figures = [one.figures[metric] if one else None for one in mine]
        gains = [one.gains.get(metric) if one else None for one in mine]
        tables[metric].append((variant, *map(_plain, figures)))
        if variant != study.baseline_name:
            tables[f"Δ {metric}"].append((variant, *map(_signed, gains)))
    headings = ("variant", *map(protocol_title, protocols))
    return [Sheet(title, headings, table) for title, table in tables.items() if table]


def _title(protocol: str, rows: Sequence[StudyRow]) -> str:
    counts = {row.valid_queries for row in rows if row.protocol == protocol}
    told = " or ".join(f"{count:,}" for count in sorted(counts))
    return f"{protocol_title(protocol)}, {told} queries"


def _cells(study: StudyConfig, summary: Summary) -> tuple[str, ...]:
    figures = [summary.figures[metric] for metric in study.metrics]
    gains = [summary.gains.get(metric) for metric in study.metrics]
    return (
        str(max(figure.count for figure in figures)),
        *(_plain(figure) for figure in figures),
        *("" if gain is None else _signed(gain) for gain in gains),
    )


def _plain(value: Spread | None) -> str:
    return f"{value.mean:.1f}{_deviation(value)}" if value and value.count else "-"


def _signed(value: Spread | None) -> str:
    if not value or not value.count:
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
