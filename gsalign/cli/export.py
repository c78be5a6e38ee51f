"""``gsalign export``: a network as ONNX, as a program of PyTorch, or compiled."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gsalign.cli.embedding import add_checkpoint_option, config_beside, load_checkpoint

FORMATS = ("onnx", "program", "compiled")


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "export",
        help="a network as ONNX, program or compiled package",
        description="Writes a network that gives the embeddings of gsalign extract: as ONNX, which "
        "needs nothing of this library; as a program of torch.export (.pt2); or compiled by "
        "AOTInductor for CPUs like this one (.pt2). The file is compared with the network before "
        "it is put in its place.",
    )
    add_checkpoint_option(parser)
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="default: onnx")
    parser.add_argument("--out", required=True, metavar="FILE", help=".onnx, or .pt2")
    parser.add_argument(
        "--normalise", choices=("outside", "inside"), default="outside",
        help="who maps pixel values to -1 .. 1: the caller, as in training (default), or the file, "
        "which then takes 0 .. 255",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Export and compare."""
    from gsalign.cli.console import log_to, make_console
    from gsalign.engine.kernels import chosen_kernels
    from gsalign.export import EmbeddingModule, export_compiled, export_onnx, export_program

    console = make_console()
    log_to(console)
    config = config_beside(arguments)
    module = EmbeddingModule(load_checkpoint(arguments, config), arguments.normalise)
    write = {"onnx": export_onnx, "program": export_program, "compiled": export_compiled}
    with chosen_kernels(config.kernels):
        agreement = write[arguments.format](module, arguments.out)
    size = Path(arguments.out).stat().st_size / 2**20
    console.print(f"{arguments.out}: {arguments.format}, {size:.1f} MiB")
    console.print(f"compared with the network: {agreement}")
    for name, value in module.metadata().items():
        if name in ("input", "resize", "output"):
            console.print(f"{name}: {value}", markup=False)
    return 0
