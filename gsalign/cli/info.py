"""``gsalign info``: what can serve which operator on this machine, versions, what was built."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsalign.errors import ConfigError

if TYPE_CHECKING:
    from gsalign.model import ModelConfig


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "info",
        help="kernels, versions and what was compiled",
        description="Shows which implementation can serve which operator on this machine and why "
        "others cannot, what `auto` takes, the versions, and what the installation compiled. With "
        "--model what a network costs instead.",
    )
    parser.add_argument(
        "--model",
        metavar="FILE",
        help="parameters and multiply-accumulates of the network of a configuration (.yaml) or of "
        "weights (.safetensors)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the report."""
    if arguments.model is not None:
        return _print_cost(arguments.model)
    from rich import box
    from rich.console import Group
    from rich.table import Table

    from gsalign import __version__
    from gsalign.cli.console import make_console
    from gsalign.evaluation import ranking_report
    from gsalign_kernels import kernel_report

    report = kernel_report()
    console = make_console(markup=True)
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


def _print_cost(file: str) -> int:
    from rich import box
    from rich.table import Table

    from gsalign.cli.console import make_console
    from gsalign.model.cost import count_cost

    config = _model_config(Path(file))
    height, width = config.image_size
    table = Table(
        title=f"{file}: one image of {height} x {width}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("part", no_wrap=True)
    for name in ("parameters", "GMAC, embedding", "GMAC, all tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, cost in count_cost(config).items():
        macs = (f"{count / 1e9:.3f}" if count else "" for count in (cost.macs, cost.all_tokens))
        table.add_row(name, f"{cost.parameters:,}", *macs, style="bold" if name == "total" else "")
    console = make_console()
    console.print(table)
    console.print(
        f"embedding: {config.embedding_size} numbers. Of the last block an embedding needs the "
        "class and view tokens only (all with parts); the published code computes all."
    )
    return 0


def _model_config(path: Path) -> ModelConfig:
    from gsalign.config import load_config
    from gsalign.model import read_weights_config

    if path.suffix in (".yaml", ".yml"):
        return load_config(path).model
    if path.suffix == ".safetensors":
        return read_weights_config(path)
    raise ConfigError(
        f"--model is {path}; wanted a configuration (.yaml) or weights of ours (.safetensors)"
    )


def _packages() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in (
        "torchvision",
        "timm",
        "accelerate",
        "safetensors",
        "numpy",
        "faiss-cpu",
        "pyarrow",
        "onnxruntime",
    ):
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
