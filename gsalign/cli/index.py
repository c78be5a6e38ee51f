"""``gsalign index``: make an index of embeddings, add to it, remove from it, look at it."""

from __future__ import annotations

import argparse
from typing import Any

from gsalign.errors import ConfigError


def add_parser(subparsers: Any) -> None:
    """Add the command and its subcommands."""
    parser = subparsers.add_parser("index", help="make and change an index of embeddings")
    inner = parser.add_subparsers(dest="index_command", metavar="command", required=True)

    build = inner.add_parser(
        "build",
        help="make an index",
        description="Makes an index of folders of embeddings (gsalign extract). exact ranks every "
        "image; hnsw (a graph) and ivfpq (lists of short codes) find a short list by FAISS, which "
        "is ranked exactly.",
    )
    build.add_argument("sources", nargs="+", metavar="EMBEDDINGS", help="folders of embeddings")
    build.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    build.add_argument(
        "--kind",
        choices=("exact", "hnsw", "ivfpq"),
        default="exact",
        help="how it finds (default: exact)",
    )
    build.add_argument(
        "--shard-size", type=int, metavar="N", help="images in a shard (default: 1,000,000)"
    )
    build.add_argument("--shards", type=int, metavar="N", help="or: number of shards")
    build.add_argument("--neighbours", type=int, metavar="N", help="hnsw: edges (default: 32)")
    build.add_argument(
        "--construction", type=int, metavar="N", help="hnsw: candidates for edges (default: 80)"
    )
    build.add_argument("--lists", type=int, metavar="N", help="ivfpq (default: 4 sqrt(images))")
    build.add_argument(
        "--code-size", type=int, metavar="BYTES", help="ivfpq (default: an eighth of the numbers)"
    )
    build.add_argument("--overwrite", action="store_true", help="replace an index in the folder")
    build.add_argument("--force", action="store_true", help="even if the memory will not do")
    build.set_defaults(run=run_build)

    add = inner.add_parser(
        "add",
        help="add embeddings to an index",
        description="Adds folders of embeddings (gsalign extract) of the network that made the "
        "index. Images that are in it already are an error without --replace.",
    )
    add.add_argument("index", metavar="INDEX", help="folder of the index")
    add.add_argument("sources", nargs="+", metavar="EMBEDDINGS", help="folders of embeddings")
    add.add_argument("--replace", action="store_true", help="of images that are in it already too")
    add.set_defaults(run=run_add)

    remove = inner.add_parser(
        "remove",
        help="remove images from an index",
        description="Removes images; their vectors and labels leave the disk.",
    )
    remove.add_argument("index", metavar="INDEX", help="folder of the index")
    remove.add_argument(
        "--path",
        nargs="+",
        default=[],
        metavar="FILE",
        help="these images; relative paths start here",
    )
    remove.add_argument(
        "--identity", nargs="+", default=[], metavar="NAME", help="all images of these identities"
    )
    remove.add_argument(
        "--id", nargs="+", type=int, default=[], metavar="N", dest="ids", help="images by their ids"
    )
    remove.set_defaults(run=run_remove)

    info = inner.add_parser(
        "info",
        help="what an index holds",
        description="Prints kind, size, labels and network of an index; checks it where asked to.",
    )
    info.add_argument("index", metavar="INDEX", help="folder of the index")
    info.add_argument("--verify", action="store_true", help="compare every file with its hash")
    info.add_argument(
        "--recall", type=int, metavar="N",
        help="search with N stored vectors, and compare with ranking all",
    )  # fmt: skip
    info.add_argument("--json", action="store_true", help="print as JSON")
    info.set_defaults(run=run_info)

    export = inner.add_parser(
        "export",
        help="parquet files that Milvus imports",
        description="Writes vectors and labels as parquet files for the bulk import of Milvus.",
    )
    export.add_argument("index", metavar="INDEX", help="folder of the index")
    export.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    export.add_argument(
        "--rows", type=int, default=100_000, metavar="N", help="in a file (default: 100,000)"
    )
    export.set_defaults(run=run_export)


def run_build(arguments: argparse.Namespace) -> int:
    """Build."""
    from pydantic import ValidationError

    from gsalign.cli.console import log_to, make_console
    from gsalign.search import IndexSettings, SearchIndex, open_extraction

    console = make_console()
    log_to(console)
    names = ("kind", "shard_size", "neighbours", "construction", "lists", "code_size")
    values = {name: getattr(arguments, name) for name in names}
    sources = [open_extraction(source) for source in arguments.sources]
    if arguments.shards is not None:
        if arguments.shards < 1 or arguments.shard_size is not None:
            raise ConfigError(
                f"--shards is {arguments.shards}; wanted 1 or more, and not --shard-size too"
            )
        total = sum(len(source) for source in sources)
        values["shard_size"] = -(-total // arguments.shards)
    try:
        settings = IndexSettings(**{k: value for k, value in values.items() if value is not None})
    except ValidationError as error:
        fault = error.errors()[0]
        option = str(fault["loc"][0]).replace("_", "-")
        raise ConfigError(f"--{option} is {fault['input']}: {fault['msg']}") from None
    index = SearchIndex.build(
        sources, arguments.out, settings, overwrite=arguments.overwrite, force=arguments.force
    )
    console.print(_sum_up(index))
    return 0


def run_add(arguments: argparse.Namespace) -> int:
    """Add, one folder after the other."""
    from gsalign.cli.console import log_to, make_console
    from gsalign.search import SearchIndex, open_extraction

    console = make_console()
    log_to(console)
    sources = [open_extraction(source) for source in arguments.sources]
    index = SearchIndex.open(arguments.index)
    for source in sources:
        index.add(source, replace=arguments.replace)
    console.print(_sum_up(index))
    return 0


def run_remove(arguments: argparse.Namespace) -> int:
    """Remove."""
    from gsalign.cli.console import make_console
    from gsalign.search import SearchIndex

    if not (arguments.path or arguments.identity or arguments.ids):
        raise ConfigError("nothing to remove: give --path, --identity or --id")
    index = SearchIndex.open(arguments.index)
    removed = index.remove(paths=arguments.path, identities=arguments.identity, ids=arguments.ids)
    console = make_console()
    console.print(f"removed {removed} images")
    console.print(_sum_up(index))
    return 0


def run_info(arguments: argparse.Namespace) -> int:
    """Describe."""
    import json
    from collections import Counter

    from gsalign.cli.console import make_console
    from gsalign.search import SearchIndex

    if arguments.recall is not None and arguments.recall < 1:
        raise ConfigError(f"--recall is {arguments.recall}; wanted 1 or more")
    index = SearchIndex.open(arguments.index)
    manifest, images = index.manifest, index.images
    if arguments.verify:
        index.verify()
    size = sum(file.bytes for shard in manifest.shards for file in shard.files.values())
    document: dict[str, Any] = {
        "images": len(index),
        "identities": len(set(images.identities) - {""}),
        "cameras": len(set(images.cameras) - {""}),
        "views": dict(sorted(Counter(view or "unknown" for view in images.views).items())),
        "dimension": manifest.dimension,
        "slots": manifest.slots,
        "metric": manifest.metric,
        "shards": len(manifest.shards),
        "bytes": size,
        "settings": manifest.settings.model_dump(),
        "network": manifest.fingerprint.network,
        "preprocessing": manifest.fingerprint.preprocessing,
        "checkpoint": manifest.checkpoint,
    }
    if arguments.verify:
        document["verified"] = True
    if arguments.recall is not None:
        document["recall_at_10"] = index.recall(index.sample(arguments.recall), 10)
    if arguments.json:
        print(json.dumps(document, indent=2))
        return 0
    console = make_console()
    for name, value in document.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {inner}" for key, inner in value.items()) or "none"
        console.print(f"{name:<14} {value}", markup=False)
    return 0


def run_export(arguments: argparse.Namespace) -> int:
    """Write parquet files."""
    from gsalign.cli.console import make_console
    from gsalign.search import SearchIndex
    from gsalign.search.milvus import export_milvus

    files = export_milvus(SearchIndex.open(arguments.index), arguments.out, rows=arguments.rows)
    for path in files:
        make_console().print(f"wrote {path}")
    return 0


def _sum_up(index: Any) -> str:
    manifest = index.manifest
    shards = "1 shard" if len(manifest.shards) == 1 else f"{len(manifest.shards)} shards"
    return (
        f"{index.root}: {len(index)} images, {manifest.settings.kind}, {shards}, "
        f"{manifest.dimension} numbers, distance {manifest.metric}"
    )
