"""``gsalign search``: the images of an index that are most like others."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsalign.cli.embedding import (
    add_checkpoint_option,
    add_embedding_options,
    config_beside,
    make_embedder,
)
from gsalign.cli.options import split_overrides
from gsalign.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from gsalign.search import ImageTable, SearchIndex

# Queries that are answered at a time.
BLOCK = 256
WIDE = 5000


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "search",
        help="find images like others in an index",
        description="Embeds the queries, or takes a folder of embeddings, and prints the nearest "
        "images of the index with exact distances: 1 - cosine, or the part distance.",
    )
    parser.add_argument("index", metavar="INDEX", help="folder of gsalign index build")
    parser.add_argument(
        "queries",
        nargs="+",
        metavar="QUERY",
        help="images, folders, tables or lists as in gsalign extract; or one folder of embeddings",
    )
    parser.add_argument("-k", type=int, default=10, metavar="N", help="hits (default: 10)")
    parser.add_argument("--view", choices=("aerial", "ground"), help="only images of this view")
    parser.add_argument(
        "--camera", action="append", default=[], metavar="NAME",
        help="only images of this camera; may be given again",
    )  # fmt: skip
    parser.add_argument(
        "--not-camera", action="append", default=[], metavar="NAME",
        help="no image of this camera; may be given again",
    )  # fmt: skip
    parser.add_argument(
        "--by-identity", action="store_true", help="of every identity only the nearest image"
    )
    parser.add_argument(
        "--max-distance", type=float, metavar="D", help="leave out what is further away"
    )
    parser.add_argument("--exact", action="store_true", help="rank all images, whatever the kind")
    parser.add_argument(
        "--shortlist", type=int, default=0, metavar="N",
        help="candidates an approximate index puts up for exact ranking (default: 10 k, at "
        "least 100)",
    )  # fmt: skip
    parser.add_argument(
        "--effort", type=int, default=0, metavar="N",
        help="lists visited (ivfpq), or candidates kept on the walk (hnsw)",
    )  # fmt: skip
    parser.add_argument(
        "--recall", action="store_true", help="also rank all, and tell how many hits were found"
    )
    parser.add_argument(
        "--format", choices=("table", "json", "csv"), default="table", help="of what is printed"
    )
    parser.add_argument("--out", metavar="FILE", help="write it there instead of printing it")
    parser.add_argument("--html", metavar="FILE", help="write a page with pictures too")
    parser.add_argument(
        "--names", choices=("plain", "cargo"), default="plain",
        help="what file names of queries say, as in gsalign extract",
    )  # fmt: skip
    add_checkpoint_option(parser, required=False)
    add_embedding_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Embed, search, report."""
    from rich.console import Console

    from gsalign.cli.console import log_to, make_console
    from gsalign.engine.display import Display
    from gsalign.files import atomic_write
    from gsalign.search import Filter, SearchIndex
    from gsalign.search.rank_sheet import write_rank_sheet
    from gsalign.search.report import as_csv, as_json, as_tables, make_answers

    arguments.queries = split_overrides(arguments, arguments.queries)
    if arguments.k < 1:
        raise ConfigError(f"-k is {arguments.k}; wanted 1 or more")
    # What a program reads is alone on standard output.
    console = make_console() if arguments.format == "table" else Console(stderr=True)
    log_to(console)
    index = SearchIndex.open(arguments.index)
    only = Filter(arguments.view or "", arguments.camera, arguments.not_camera)
    _require_cameras(index, [*arguments.camera, *arguments.not_camera])
    images, vectors = _queries(arguments, index)
    options: dict[str, Any] = {
        "only": only,
        "shortlist": arguments.shortlist,
        "effort": arguments.effort,
    }
    found = []
    for start in range(0, len(vectors), BLOCK):
        found += index.search(
            vectors[start : start + BLOCK],
            arguments.k,
            by_identity=arguments.by_identity,
            exact=arguments.exact,
            **options,
        )
    if arguments.max_distance is not None:
        found = [
            tuple(hit for hit in hits if hit.distance <= arguments.max_distance) for hits in found
        ]
    answers = make_answers(images, found)
    if arguments.format == "table":
        # As wide as the paths want it: a folded path cannot be copied.
        tables = [Display.as_text(table, WIDE).strip("\n") for table in as_tables(answers)]
        text = "\n\n".join(tables) + "\n"
    else:
        text = (as_json if arguments.format == "json" else as_csv)(answers)
    if arguments.out is None:
        print(text, end="")
    else:
        with atomic_write(arguments.out) as temporary:
            temporary.write_text(text, encoding="utf-8")
    if arguments.html:
        kind = index.manifest.settings.kind
        note = f"{index.root}: {len(index)} images, {kind}; distance {index.manifest.metric}"
        write_rank_sheet(answers, arguments.html, title="Search results", note=note)
    if arguments.recall:
        share = index.recall(vectors, arguments.k, **options)
        console.print(f"recall of the {arguments.k} nearest: {share:.4f}")
    return 0


def _require_cameras(index: SearchIndex, cameras: list[str]) -> None:
    known = set(index.images.cameras)
    for camera in cameras:
        if camera not in known:
            some = ", ".join(sorted(known - {""})[:20]) or "none that has a name"
            raise DataError(f"{index.root} has no image of camera {camera!r}; its cameras: {some}")


def _queries(
    arguments: argparse.Namespace, index: SearchIndex
) -> tuple[ImageTable, NDArray[np.float32]]:
    """The images that ask, and their embeddings."""
    from gsalign.search import list_images, open_extraction
    from gsalign.search.extraction import MANIFEST

    if len(arguments.queries) == 1 and (Path(arguments.queries[0]) / MANIFEST).is_file():
        made = open_extraction(arguments.queries[0])
        index.require(made.manifest.fingerprint)
        return made.images, made.embeddings

    from gsalign.engine.kernels import chosen_kernels
    from gsalign.search import embed_images

    if arguments.checkpoint is None:
        arguments.checkpoint = index.manifest.checkpoint
        if not Path(arguments.checkpoint).is_file():
            raise ConfigError(
                f"the network of {index.root} is not where it was ({arguments.checkpoint or '-'}): "
                "give --checkpoint"
            )
    config = config_beside(arguments)
    images = list_images(arguments.queries, names=arguments.names)
    with chosen_kernels(config.kernels):
        embedder = make_embedder(arguments, config)
        index.require(embedder.fingerprint)
        readable, vectors = embed_images(embedder, images, workers=arguments.workers)
    if not len(readable):
        raise DataError(f"none of the {len(images)} queries can be read")
    return readable, vectors
