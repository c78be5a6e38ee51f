"""A study: variants of a configuration, each trained with several seeds, compared with spread."""

from __future__ import annotations

from gsalign.study.config import StudyConfig, StudyData, Variant, read_study
from gsalign.study.data import prepare_data
from gsalign.study.folder import StudyFolder
from gsalign.study.plan import StudyRun, plan_runs
from gsalign.study.report import markdown_report, report_tables
from gsalign.study.rows import StudyRow, collect_rows, read_rows, write_rows
from gsalign.study.runner import Outcome, carry_out
from gsalign.study.state import RunState, refuse_changed, state_of
from gsalign.study.summary import Spread, Summary, paired_spread, spread, summarise

__all__ = [
    "Outcome",
    "RunState",
    "Spread",
    "StudyConfig",
    "StudyData",
    "StudyFolder",
    "StudyRow",
    "StudyRun",
    "Summary",
    "Variant",
    "carry_out",
    "collect_rows",
    "markdown_report",
    "paired_spread",
    "plan_runs",
    "prepare_data",
    "read_rows",
    "read_study",
    "refuse_changed",
    "report_tables",
    "spread",
    "state_of",
    "summarise",
    "write_rows",
]
