"""Results as a table for people and as a dictionary for ``metrics.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol as Interface

from rich.table import Table

from gsalign.evaluation.protocols import protocol_title
from gsalign.evaluation.verification import FALSE_POSITIVE_RATES, OpenSetThreshold
from gsalign.tables import plain_table

COLUMNS = ("Rank-1", "Rank-5", "Rank-10", "mAP", "mINP", "metric")

Summary = Mapping[str, "float | int | None"]


class Summarised(Interface):
    """Whatever has a summary in percent: ``EvaluationResult``, ``ChanceLevel``."""

    def as_dict(self) -> dict[str, float | int | None]:
        """Return the summary."""


def results_dict(results: Mapping[str, Summarised]) -> dict[str, dict[str, float | int | None]]:
    """Return the summaries of all protocols; figures are in percent, missing ones ``None``."""
    return {name: result.as_dict() for name, result in results.items()}


def results_table(
    results: Mapping[str, Summarised | Summary], *, dataset: str = "", title: str = ""
) -> Table:
    """Lay results out as a rich table, a row per protocol.

    Args:
        results: name to result or summary. Names of protocols are shown by their short titles.
        dataset: put before each protocol.
        title: of the table.

    Returns:
        Dataset, Rank-1, Rank-5, Rank-10, mAP, mINP, metric in percent, and how many queries are
        valid of how many are asked; a dash where there is no figure.
    """
    table = plain_table(title, ["Dataset"], (*COLUMNS, "valid/asked"))
    for row in result_rows(results, dataset=dataset):
        table.add_row(*row)
    return table


def result_rows(
    results: Mapping[str, Summarised | Summary], *, dataset: str = ""
) -> list[tuple[str, ...]]:
    """Return the cells of ``results_table`` as text, for logs and for Markdown."""
    rows = []
    for name, result in results.items():
        summary = result if isinstance(result, Mapping) else result.as_dict()
        rows.append(
            (
                f"{dataset} {protocol_title(name)}".strip(),
                *(_percent(summary.get(column)) for column in COLUMNS),
                f"{summary['valid_queries']}/{summary['queries']}",
            )
        )
    return rows


def roc_table(rates: Mapping[str, Summary], *, dataset: str = "") -> Table:
    """Lay true positive rates out as a rich table, a row per protocol.

    Args:
        rates: protocol name to ``Verification.as_dict``.
        dataset: put before each protocol.

    Returns:
        The rates in percent and the numbers of pairs of one person and of two; a dash where a
        false positive rate is less than one pair.
    """
    at = [f"{rate:.0e}" for rate in FALSE_POSITIVE_RATES]
    table = plain_table(
        "true positive rate in percent, at a false positive rate of",
        ["Dataset"],
        (*at, "same person", "other"),
    )
    for name, figures in rates.items():
        table.add_row(
            f"{dataset} {protocol_title(name)}".strip(),
            *(_percent(figures[f"TPR@FPR={rate}"]) for rate in at),
            *(f"{figures[pairs]:,}" for pairs in ("positives", "negatives")),
        )
    return table


def threshold_table(threshold: OpenSetThreshold) -> Table:
    """Lay an open-set threshold out as a rich table: its error rates in percent, by split."""
    distance = threshold.calibration.threshold
    table = plain_table(
        f"same person up to a distance of {distance:.4f}, calibrated for a false accept rate of "
        f"{threshold.target:g}",
        ["pairs of"],
        ("false accept", "false reject", "same person", "other"),
    )
    rows = {"validation": threshold.calibration}
    rows |= {f"test {protocol_title(name)}": rates for name, rates in threshold.test.items()}
    for label, rates in rows.items():
        figures = rates.as_dict()
        table.add_row(
            label,
            *(_percent(figures[rate], digits=4) for rate in ("false_accept", "false_reject")),
            f"{rates.positives:,}",
            f"{rates.negatives:,}",
        )
    return table


def _percent(value: float | int | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
