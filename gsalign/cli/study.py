"""``gsalign study``: variants of a configuration with several seeds, compared with spread."""

from __future__ import annotations

import argparse
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsalign.cli.exit_codes import INTERRUPTED
from gsalign.errors import ConfigError, GSAlignError

if TYPE_CHECKING:
    from rich.console import Console

    from gsalign.study import Outcome, RunState, StudyConfig, StudyFolder, StudyRow, StudyRun


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "study",
        help="compare variants over several seeds",
        description="Trains every variant of a study file with every seed, each as gsalign train "
        "does, and reports mean, spread and the paired difference from the baseline: study.csv, "
        "study.md, study.png and curves.png. Finished runs are kept, half-finished ones go on: "
        "after Ctrl-C or a failure the same command continues. See docs/study.md.",
    )
    parser.add_argument("study", metavar="STUDY.yaml", help="the study; see configs/study_*.yaml")
    parser.add_argument("--out", metavar="DIR", help="default: logs/study/<name of the study>")
    parser.add_argument(
        "--seeds", nargs="+", type=int, metavar="N", help="instead of the study's seeds"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these variants only")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)"
    )
    parser.add_argument(
        "--report", action="store_true", help="run nothing; write the report anew from study.csv"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Make the data sets, carry out what is not finished, report."""
    from gsalign.cli.console import make_console
    from gsalign.study import StudyFolder, read_rows, read_study

    if arguments.jobs < 1:
        raise ConfigError(f"--jobs is {arguments.jobs}; wanted at least 1")
    for seed in arguments.seeds or ():
        if not 0 <= seed < 2**31:
            raise ConfigError(f"--seeds has {seed}; wanted numbers from 0 to 2147483647")
    study = read_study(arguments.study)
    folder = StudyFolder(Path(arguments.out or Path("logs") / "study" / study.name))
    console = make_console()
    if arguments.report:
        _report(study, folder, read_rows(folder.table), console)
        return 0
    with folder.claimed() as claim:
        return _Session(arguments, study, folder, console).carry_out(claim)


class _Session:
    """One call of the command that runs something."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        study: StudyConfig,
        folder: StudyFolder,
        console: Console,
    ) -> None:
        from gsalign.study import RunState, plan_runs, refuse_changed, state_of

        self.study, self.folder, self.console = study, folder, console
        self.jobs: int = arguments.jobs
        self.source: str = arguments.study
        self.runs = plan_runs(
            study,
            folder,
            seeds=arguments.seeds or (),
            only=arguments.only or (),
            source=self.source,
        )
        refuse_changed({run.folder: run for run in (*self.runs, *self._all_there())}.values())
        self.open = [run for run in self.runs if state_of(run) is not RunState.FINISHED]
        self.begun = 0
        self.seconds: list[float] = []
        self.failures: list[Outcome] = []

    def _all_there(self) -> list[StudyRun]:
        """The runs that have a folder, whether they are asked for now or not."""
        from gsalign.study.plan import make_run

        return [
            make_run(self.study, self.folder, variant, seed, source=self.source)
            for variant in self.study.variants
            for seed in self.folder.seeds(variant)
        ]

    def carry_out(self, claim: int) -> int:
        """Run what is open; returns the exit code."""
        from gsalign.study import carry_out, read_rows

        done = len(self.runs) - len(self.open)
        self.console.print(
            f"study {self.study.name}: {len(self.runs)} runs, {done} of them finished; writing to "
            f"{self.folder.root}"
        )
        if self.open:
            self._prepare_data()
        ran = carry_out(
            self.open,
            jobs=self.jobs,
            keep_open=(claim,),
            on_start=self._started,
            on_end=self._ended,
        )
        self._write_table()
        # As the table has them, rounded, so that --report makes the same report.
        if rows := read_rows(self.folder.table):
            _report(self.study, self.folder, rows, self.console)
        if not ran:
            raise KeyboardInterrupt("study stopped; the same command goes on where it was")
        if self.failures:
            told = "; ".join(f"{one.run}: {_why(one)}" for one in self.failures)
            raise GSAlignError(
                f"{len(self.failures)} of {len(self.runs)} runs failed, the others went on: "
                f"{told}. What they printed is in output.txt of their folders; the same command "
                "tries them again"
            )
        return 0

    def _prepare_data(self) -> None:
        import os

        from gsalign.cli.console import progress
        from gsalign.study import prepare_data

        cores = len(os.sched_getaffinity(0))
        for name in dict.fromkeys(self.study.data_name(run.variant) for run in self.open):
            with progress(self.console, f"rendering {name}", "images") as report:
                made = prepare_data(
                    name,
                    self.study.data[name],
                    workers=cores if cores > 1 else 0,
                    progress=report,
                )
            if made is not None:
                how = "is there already" if made.reused else f"rendered in {made.seconds:.0f} s"
                self.console.print(f"data {name}: {made.images:,} images, {how}")

    def _started(self, run: StudyRun, state: RunState) -> None:
        from gsalign.study import RunState

        self.begun += 1
        how = {RunState.HALFWAY: "resumed", RunState.BEGUN: "begun again"}.get(state, "begun")
        self.console.print(f"[{self.begun}/{len(self.open)}] {run}: {how}, {run.folder.root}")

    def _ended(self, outcome: Outcome) -> None:
        if outcome.finished:
            self.seconds.append(outcome.seconds)
            self._write_table()
            self.console.print(f"{outcome.run}: {self._figures(outcome.run)}{self._time_left()}")
            return
        if outcome.code == INTERRUPTED:
            self.console.print(f"{outcome.run}: {outcome.said}")
        else:
            self.console.print(f"{outcome.run}: failed, {_why(outcome)}")
        self.failures.append(outcome)

    def _write_table(self) -> None:
        """Write the table of all that is finished."""
        from gsalign.study import RunState, collect_rows, state_of, write_rows

        rows = collect_rows(r for r in self._all_there() if state_of(r) is RunState.FINISHED)
        write_rows(self.folder.table, rows)

    def _figures(self, run: StudyRun) -> str:
        from gsalign.evaluation import protocol_title
        from gsalign.study import collect_rows

        wanted = self.study.protocols
        metric = self.study.main_metric
        return f"{metric} " + ", ".join(
            f"{protocol_title(row.protocol)} {row.figures[metric]:.1f}"
            for row in collect_rows([run])
            if row.is_final and (not wanted or row.protocol in wanted)
        )

    def _time_left(self) -> str:
        left = len(self.open) - len(self.seconds) - len(self.failures)
        if not left:
            return ""
        mean = sum(self.seconds) / len(self.seconds)
        return f"; about {timedelta(seconds=round(mean * left / self.jobs))} left"


def _why(outcome: Outcome) -> str:
    """Why a run did not finish, in its own words."""
    if outcome.code < 0:
        return f"killed by signal {-outcome.code}"
    return outcome.said.removeprefix("gsalign: ").removeprefix("error: ")


def _report(
    study: StudyConfig, folder: StudyFolder, rows: list[StudyRow], console: Console
) -> None:
    """Print the tables, write the page and the pictures."""
    from gsalign.files import atomic_write
    from gsalign.study import markdown_report, report_tables
    from gsalign.study.report import NOTE
    from gsalign.visualize import study_curves, study_points

    for table in report_tables(study, rows):
        console.print(table)
        console.print()
    console.print(NOTE)
    with atomic_write(folder.report) as temporary:
        temporary.write_text(markdown_report(study, rows), encoding="utf-8")
    metric, protocols = study.main_metric, study.protocols
    title = f"Study {study.name}: {metric}"
    study_points(
        rows,
        folder.picture,
        metric=metric,
        baseline=study.baseline_name,
        protocols=protocols,
        title=title,
    )
    study_curves(rows, folder.curves, metric=metric, protocols=protocols, title=title)
    for path in (folder.table, folder.report, folder.picture, folder.curves):
        console.print(f"wrote {path}")
