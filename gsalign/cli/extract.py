"""``gsalign extract``: embeddings of one's own images."""

from __future__ import annotations

import argparse
from typing import Any

from gsalign.cli.embedding import (
    add_checkpoint_option,
    add_embedding_options,
    config_beside,
    make_embedder,
)
from gsalign.cli.options import split_overrides


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "extract",
        help="embeddings of your own images",
        description="Embeds images into a folder: embeddings.npy (float32, unit vectors), a table "
        "of paths and labels, and embeddings.json, which says what they were made by. Ctrl-C loses "
        "nothing: the same command goes on. Images that cannot be read are left out and named.",
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="folders, tables (.csv or .parquet: path and, where known, identity, camera, view), "
        "lists (.txt) or images",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    add_checkpoint_option(parser)
    add_embedding_options(parser)
    parser.add_argument(
        "--names", choices=("plain", "cargo"), default="plain",
        help="what file names in folders and lists say: nothing, or identity, camera and view as "
        "in CARGO",
    )  # fmt: skip
    parser.add_argument(
        "--table", choices=("csv", "parquet"), default="csv", help="format of the table"
    )
    parser.add_argument("--strict", action="store_true", help="stop at an image that is broken")
    parser.add_argument("--overwrite", action="store_true", help="replace what the folder holds")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Embed, and sum up."""
    from gsalign.cli.console import log_to, make_console, progress
    from gsalign.engine.kernels import chosen_kernels
    from gsalign.search import extract, list_images

    sources = split_overrides(arguments, arguments.sources)
    config = config_beside(arguments)
    console = make_console()
    log_to(console)
    images = list_images(sources, names=arguments.names)
    with chosen_kernels(config.kernels):
        embedder = make_embedder(arguments, config)
        with progress(console, "embedding", "images") as report:
            made = extract(
                embedder,
                images,
                arguments.out,
                workers=arguments.workers,
                table=arguments.table,
                strict=arguments.strict,
                overwrite=arguments.overwrite,
                progress=report,
            )
    console.print(f"{made.root}: {len(made)} embeddings of {made.manifest.dimension} numbers")
    if made.skipped:
        console.print(f"{len(made.skipped)} of {len(images)} images could not be read")
    return 0
