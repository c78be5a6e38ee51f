"""``gsalign visualize``: pictures of a run, written beside its weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gsalign.cli.options import add_config_options, read_config


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "visualize",
        help="training curves, rank lists, LTPS grids, part masks, contact sheet",
        description="Writes training_curves.png, rank_lists.png, ltps_grids.png, for a network "
        "with parts part_masks.png and for a generated data set contact_sheet.png into the run's "
        "folder.",
    )
    parser.add_argument("--run", required=True, dest="folder", metavar="DIR", help="of a run")
    parser.add_argument("--out", metavar="DIR", help="where to write instead")
    add_config_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Draw everything there is to draw."""
    from gsalign.cli.console import log_to, make_console
    from gsalign.engine.folder import RunFolder
    from gsalign.engine.kernels import chosen_kernels
    from gsalign.errors import ConfigError

    folder = RunFolder(Path(arguments.folder))
    if not folder.is_used():
        raise ConfigError(
            f"--run {folder.root} is not the folder of a run: it has no {folder.metrics.name}; "
            "runs are in logs/<data set>/<name>"
        )
    config = read_config(arguments, fallback=folder.config)
    console = make_console()
    log_to(console)
    from gsalign.engine.pictures import draw_run

    with chosen_kernels(config.kernels):
        for path in draw_run(folder, config, Path(arguments.out or folder.root)):
            console.print(f"wrote {path}")
    return 0
