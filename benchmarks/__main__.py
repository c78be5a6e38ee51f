"""``python -m benchmarks``: measures, prints a table, writes a CSV."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.rows import ALLOCATOR

RESULTS = Path(__file__).with_name("results")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--only", nargs="+", metavar="OP", help="operators or families")
    made.add_argument("--quick", action="store_true", help="small and short: does all of it run?")
    made.add_argument("--full", action="store_true", help="the published ViT-B model too")
    made.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    made.add_argument("--threads", type=int, metavar="N", help="CPU threads (PyTorch's default)")
    made.add_argument("--plain-allocator", action="store_true", help="glibc's own settings")
    made.add_argument("--out", type=Path, metavar="FILE.csv", help="default: by the device's name")
    return made


def restart_with_allocator(arguments: Sequence[str], module: str = "benchmarks") -> None:
    """Replaces this process by one whose heap is kept; glibc reads the settings only at its start.

    Returns where they are in force already, or where there is no glibc to read them.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    if all(os.environ.get(name) == value for name, value in ALLOCATOR.items()):
        return
    command = [sys.executable, "-m", module, *arguments]
    os.execve(sys.executable, command, os.environ | ALLOCATOR)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; 1 when a provider was wrong or one of ours failed."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    line = parser()
    options = line.parse_args(arguments)
    if options.threads is not None and options.threads < 1:
        line.error(f"--threads: wanted at least 1, got {options.threads}")
    if options.device == "cpu" and not options.plain_allocator:
        restart_with_allocator(arguments)

    import torch
    from rich.console import Console

    from benchmarks import (
        bench_conv,
        bench_distance,
        bench_model,
        bench_pool,
        bench_prototype,
        bench_ranking,
        bench_tps,
        bench_warp,
    )
    from benchmarks.case import Choice
    from benchmarks.check import WrongResultError
    from benchmarks.measure import measure_case
    from benchmarks.rows import Row, conditions_here, slug, write_csv
    from benchmarks.table import show
    from benchmarks.timing import Settings, own_stream

    families = (
        bench_warp,
        bench_tps,
        bench_pool,
        bench_prototype,
        bench_conv,
        bench_distance,
        bench_ranking,
    )
    known = [n for family in (*families, bench_model) for n in (family.FAMILY, *family.OPERATORS)]
    wanted = options.only or known
    unknown = [name for name in wanted if name not in known]
    if unknown:
        line.error(f"--only: no {', '.join(unknown)}; there are {', '.join(known)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        line.error("--device cuda: no CUDA device is visible to PyTorch")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    # Both sides compute float32 products in float32.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False

    choice = Choice(
        torch.device(options.device),
        quick=options.quick,
        compile=not (options.no_compile or options.quick),
        full=options.full,
    )
    settings = Settings.for_device(choice.device, quick=options.quick)
    conditions = conditions_here(choice.device)
    # A log has no width; the table needs this much.
    console = Console() if sys.stdout.isatty() else Console(width=150)
    progress = Console(stderr=True)
    rows: list[Row] = []
    missing: set[tuple[str, str, str]] = set()
    wrong = False

    def keep(row: Row) -> None:
        # A reason that holds for an operator is said once, not for every shape.
        if row.p50_ms is None:
            reason = (row.op, row.implementation, row.note)
            if reason in missing:
                return
            missing.add(reason)
            row = replace(row, dtype="", shape="")
        rows.append(row)

    def report(error: Exception) -> None:
        # The rest is still measured and written: a run is long, a GPU may be lent.
        kind = "WRONG" if isinstance(error, WrongResultError) else "FAILED"
        progress.print(f"{kind}: {error}", style="bold red", highlight=False, markup=False)

    target = options.out
    if target is None:
        name = slug(conditions.device) + ("-quick" if options.quick else "")
        target = RESULTS / f"{name}{'-plain-allocator' if options.plain_allocator else ''}.csv"

    with own_stream(choice.device):
        for family in families:
            if not {family.FAMILY, *family.OPERATORS} & set(wanted):
                continue
            for case in family.cases(choice):
                if not {family.FAMILY, case.op} & set(wanted):
                    continue
                progress.print(f"{case.op} {case.shape} {case.dtype}", style="dim", highlight=False)
                try:
                    for row in measure_case(case, choice, settings):
                        keep(row)
                except (WrongResultError, RuntimeError) as error:
                    wrong = True
                    report(error)
                write_csv(target, rows, conditions)  # a run that is cut off leaves what it has
        if {bench_model.FAMILY, *bench_model.OPERATORS} & set(wanted):
            progress.print("gsalign", style="dim")
            try:
                for row in bench_model.measure(choice, settings):
                    keep(row)
            except (WrongResultError, RuntimeError) as error:
                wrong = True
                report(error)
            write_csv(target, rows, conditions)

    show(rows, conditions, console)
    console.print(f"Written: {target}", highlight=False)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
