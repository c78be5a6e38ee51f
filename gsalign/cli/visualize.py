"""``gsalign visualize``: pictures of a run, written beside its weights, or of several runs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsalign.cli.options import add_config_options, read_config, split_overrides
from gsalign.engine.pictures.names import (
    MOST_IMAGES,
    OF_OWN_IMAGES,
    OF_SEVERAL_RUNS,
    PICTURES,
    choose_pictures,
)

if TYPE_CHECKING:
    from rich.console import Console

    from gsalign.engine.pictures.run import DrawnRun


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    told = "\n".join(f"  {name:<16} {shows}" for name, shows in PICTURES.items())
    parser = subparsers.add_parser(
        "visualize",
        help="training and CMC curves, rank lists, embeddings, attention, grids, part masks",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Draws a run, into its folder, each picture as NAME.png if it applies:\n\n"
        f"{told}\n\n"
        f"Several runs are compared: {', '.join(OF_SEVERAL_RUNS)} with a line each, written into\n"
        "the current folder.",
    )
    parser.add_argument(
        "--run",
        nargs="+",
        action="extend",
        default=[],
        dest="folders",
        metavar="DIR",
        help="folder of a run; several are compared",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="weights (default: the run's best, else its last); may stand without --run",
    )
    parser.add_argument("--out", metavar="DIR", help="where to write instead")
    parser.add_argument(
        "--only", nargs="+", action="extend", default=[], metavar="NAME", help="these pictures"
    )
    parser.add_argument(
        "--images",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help=f"images of your own to look at, one person each ({', '.join(OF_OWN_IMAGES)})",
    )
    parser.add_argument(
        "--heads",
        choices=("mean", "max"),
        default="mean",
        help="attention: how the heads of a layer become one (default: mean)",
    )
    parser.add_argument(
        "--projection",
        choices=("tsne", "pca"),
        help="embedding_map: t-SNE, or principal components (default: t-SNE if scikit-learn is "
        "installed)",
    )
    add_config_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Draw everything there is to draw, or what was asked for."""
    from gsalign.cli.console import log_to, make_console
    from gsalign.engine.kernels import chosen_kernels
    from gsalign.errors import ConfigError
    from gsalign.extras import import_extra

    # Each of these options takes all that follows it, overrides too.
    folders, only, images = (
        split_overrides(arguments, taken)
        for taken in (arguments.folders, arguments.only, arguments.images)
    )
    several = len(folders) > 1
    if several and (images or arguments.checkpoint):
        given = "--images" if images else "--checkpoint"
        raise ConfigError(f"{given} goes with one run, and --run names {len(folders)}")
    names = choose_pictures(only, several=several, own_images=bool(images))
    if len(images) > MOST_IMAGES:
        raise ConfigError(
            f"--images names {len(images)} files, of which a picture has room for {MOST_IMAGES}: "
            "draw them in several, each with an --out of its own"
        )
    for image in images:
        if not Path(image).is_file():
            raise ConfigError(f"--images is {image}, which is not a file")
    if arguments.projection == "tsne" and "embedding_map" in names:
        # Told now, and not after the test set has been embedded.
        import_extra("sklearn.manifold", extra="visualize")
    if arguments.out and Path(arguments.out).is_file():
        raise ConfigError(f"--out is {arguments.out}, which is a file; wanted a folder")
    console = make_console()
    log_to(console)
    runs = _runs(arguments, folders, images, console)
    out = Path(arguments.out or (os.curdir if several else runs[0].folder.root))

    from gsalign.engine.pictures.comparison import draw_comparison
    from gsalign.engine.pictures.drawing import Choices, draw_run

    with chosen_kernels(runs[0].config.kernels):
        if several:
            drawn = draw_comparison(runs, out, names)
        else:
            choices = Choices(heads=arguments.heads, method=arguments.projection)
            drawn = draw_run(runs[0], out, names, choices=choices, insist=bool(only))
        for path in drawn:
            console.print(f"wrote {path}")
    return 0


def _runs(
    arguments: argparse.Namespace,
    folders: Sequence[str],
    images: Sequence[str],
    console: Console,
) -> list[DrawnRun]:
    """The runs that the options name; a checkpoint alone is taken for a run in its folder."""
    from gsalign.cli.console import progress
    from gsalign.engine.folder import RunFolder
    from gsalign.engine.pictures.run import DrawnRun
    from gsalign.errors import ConfigError

    checkpoint = None if arguments.checkpoint is None else Path(arguments.checkpoint)
    if not folders and checkpoint is None:
        raise ConfigError(
            "visualize needs --run DIR, or --checkpoint FILE (gsalign visualize --help)"
        )
    roots = [Path(name) for name in folders] or [Path(arguments.checkpoint).parent]
    if len({root.resolve() for root in roots}) < len(roots):
        raise ConfigError(f"--run names a folder twice: {', '.join(folders)}")
    runs = []
    for root in roots:
        folder = RunFolder(root)
        if folders and not folder.is_used():
            raise ConfigError(
                f"--run {folder.root} is not the folder of a run: it has no "
                f"{folder.metrics.name}; runs are in logs/<data set>/<name>"
            )
        config = read_config(arguments, fallback=folder.config)
        runs.append(
            DrawnRun(
                folder,
                config,
                checkpoint=checkpoint,
                images=[Path(image) for image in images],
                watch=lambda title: progress(console, title, "images"),
            )
        )
    return runs
