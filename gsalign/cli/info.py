"""``gsalign info``: what can serve which operator on this machine, versions, what was built."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "info",
        help="kernels, versions and what was compiled",
        description="Shows which implementation can serve which operator on this machine and why "
        "others cannot, what `auto` takes, the versions, and what the installation compiled.",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the report."""
    from rich import box
    from rich.console import Group
    from rich.table import Table

    from gsalign import __version__
    from gsalign.cli.console import make_console
    from gsalign.evaluation import ranking_report
    from gsalign_kernels import kernel_report

    report = kernel_report()
    console = make_console()
    reasons: list[str] = []

    def cell(reason: str | None) -> str:
        if reason is None:
            return "[green]yes[/]"
        if reason not in reasons:
            reasons.append(reason)
        return f"[red]no[/] ({reasons.index(reason) + 1})"

    kernels = Table(title="kernels", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    kernels.add_column("operator", no_wrap=True)
    names = list(next(iter(report.table.values())))
    for name in (*names, "auto takes"):
        kernels.add_column(name, no_wrap=True)
    for operator, row in report.table.items():
        automatic = report.automatic[operator]
        kernels.add_row(operator, *(cell(row[name]) for name in names), f"[bold]{automatic}[/]")

    versions = Table(title="versions", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    versions.add_column("of", no_wrap=True)
    versions.add_column("version")
    for name, version in {"gsalign": __version__, **report.versions, **_packages()}.items():
        versions.add_row(name, version)
    versions.add_row("GPU", _gpus())

    built = Table(title="compiled", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    built.add_column("module", no_wrap=True)
    built.add_column("targets, or why not")
    for name, entry in report.build.items():
        if isinstance(entry, dict) and "built" in entry:
            done = f"{', '.join(entry['targets'])} with {entry['compiler']}"
            built.add_row(name, done if entry["built"] else f"[red]not built[/]: {entry['reason']}")
    if not built.row_count:
        built.add_row("-", "nothing: this source tree was never built")

    notes = [f"({number}) {reason}" for number, reason in enumerate(reasons, 1)]
    ranking = ", ".join(f"{name}: {why or 'yes'}" for name, why in ranking_report().items())
    console.print(
        Group(
            kernels,
            *notes,
            f"choice in force: {report.choice}",
            f"ranking: {ranking}",
            "",
            versions,
            built,
        )
    )
    return 0


def _packages() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torchvision", "timm", "accelerate", "safetensors", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _gpus() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none visible"
    count = torch.cuda.device_count()
    names = [torch.cuda.get_device_name(number) for number in range(count)]
    capability = ".".join(map(str, torch.cuda.get_device_capability(0)))
    return f"{count} x {names[0]} (compute capability {capability})"
