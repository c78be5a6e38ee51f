"""Embedding a collection of images into a folder, in pieces that survive an interruption."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from gsalign import __version__
from gsalign.errors import ConfigError, DataError
from gsalign.search.changing import LOCK, changing
from gsalign.search.documents import (
    FileRecord,
    check_file,
    read_document,
    record_file,
    write_document,
)
from gsalign.search.embedder import Embedder
from gsalign.search.fingerprint import Fingerprint
from gsalign.search.shards import Plan, Shard, ShardFolder
from gsalign.search.stream import EmbeddingStream
from gsalign.search.table import ImageTable, TableFormat, read_table, write_table
from gsalign.search.vectors import open_vectors, write_vectors

EMBEDDINGS = "embeddings.npy"
TableName = Literal["images.csv", "images.parquet"]
MANIFEST = "embeddings.json"
WHAT = "a folder of embeddings (gsalign extract makes one)"

# What a process that was killed while it finished leaves behind.
_TEMPORARY = (".embeddings.*.npy", ".embeddings.*.json", ".images.*.csv", ".images.*.parquet")

Progress = Callable[[int, int], None]
"""Called with (images done, images in all)."""


class ExtractionManifest(BaseModel):
    """What lies in a folder of embeddings.

    Attributes:
        format: of the folder.
        gsalign: the version that wrote it.
        count: N, number of images.
        dimension: D, length of an embedding.
        slots: how many vectors an embedding is made of, 1 or 1 + parts.
        fingerprint: of network and preprocessing.
        checkpoint: where the network was read from; empty where it was not read.
        precision: of the computation.
        listing: digest of the images and labels that were asked for.
        skipped: a line for every image that could not be read.
        table: name of the file of paths and labels.
        files: sizes and hashes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["gsalign-embeddings-1"] = "gsalign-embeddings-1"
    gsalign: str = __version__
    count: Annotated[int, Field(ge=1)]
    dimension: Annotated[int, Field(ge=1)]
    slots: Annotated[int, Field(ge=1)]
    fingerprint: Fingerprint
    checkpoint: str
    precision: str
    listing: str
    skipped: tuple[str, ...]
    table: TableName
    files: dict[str, FileRecord]

    @model_validator(mode="after")
    def _fits_together(self) -> ExtractionManifest:
        if self.dimension % self.slots:
            raise ValueError(f"dimension {self.dimension} is no multiple of slots {self.slots}")
        for name in self.files.keys() ^ {EMBEDDINGS, self.table}:
            raise ValueError(f"the file {name!r} does not belong there, or is missing")
        return self


@dataclass(frozen=True)
class Extraction:
    """Embeddings of a collection, as :func:`extract` leaves them in a folder.

    Attributes:
        root: the folder.
        manifest: what lies in it.
    """

    root: Path
    manifest: ExtractionManifest

    def __len__(self) -> int:
        """Return the number of images."""
        return self.manifest.count

    @cached_property
    def embeddings(self) -> NDArray[np.float32]:
        """float32 ``[N, D]``, unit vectors, mapped into memory; see ``open_vectors``."""
        return open_vectors(self.root / EMBEDDINGS, (self.manifest.count, self.manifest.dimension))

    @cached_property
    def images(self) -> ImageTable:
        """Paths and labels of the images, in the order of the embeddings."""
        table, _ = read_table(self.root / self.manifest.table)
        if len(table) != len(self):
            raise DataError(
                f"{self.root / self.manifest.table} has {len(table)} rows for {len(self)} "
                "embeddings: the folder is damaged, extract again"
            )
        return table

    @property
    def skipped(self) -> tuple[str, ...]:
        """A line for every image that could not be read."""
        return self.manifest.skipped


def open_extraction(folder: str | os.PathLike[str]) -> Extraction:
    """Open a folder of embeddings; its files are compared with their hashes.

    Raises:
        DataError: it is none, it is unfinished, or it is damaged.
    """
    root = Path(folder)
    if not (root / MANIFEST).exists() and _unfinished(root).begun:
        raise DataError(f"{root} is unfinished: run the same gsalign extract again to finish it")
    manifest = read_document(ExtractionManifest, root / MANIFEST, what=WHAT)
    for name, record in manifest.files.items():
        check_file(root / name, record)
    return Extraction(root, manifest)


def extract(
    embedder: Embedder,
    images: ImageTable,
    folder: str | os.PathLike[str],
    *,
    workers: int = 0,
    table: TableFormat = "csv",
    strict: bool = False,
    overwrite: bool = False,
    shard_size: int = 1024,
    progress: Progress | None = None,
) -> Extraction:
    """Embed images into a folder: ``embeddings.npy``, ``images.csv``, ``embeddings.json``.

    What is done is written every ``shard_size`` images and when the work is interrupted, and the
    same call goes on from there. A folder that holds the very same embeddings already is returned
    as it is. Images that cannot be read are left out, logged and named in the manifest. One process
    at a time may extract into a folder.

    Args:
        embedder: makes the embeddings.
        images: which images, see :func:`gsalign.search.list_images`.
        folder: where to; made if missing.
        workers: processes that decode images; 0: this one.
        table: format of the table of paths and labels.
        strict: an image that cannot be read is an error.
        overwrite: replace other embeddings in the folder, finished or not.
        shard_size: images between two writes.
        progress: told of the progress.

    Returns:
        The embeddings, in the order of ``images``.

    Raises:
        DataError: no image can be read, or with ``strict`` one cannot or could not; an embedding is
            not finite; the folder holds something else, or another process extracts into it.
        ConfigError: a number is out of its range.
        MissingExtraError: parquet without pyarrow.
    """
    for name, value, least in (("workers", workers, 0), ("shard_size", shard_size, 1)):
        if value < least:
            raise ConfigError(f"{name} is {value}; wanted {least} or more")
    if not len(images):
        raise DataError("images is empty: there is nothing to embed")
    root = Path(folder)
    plan = Plan(
        fingerprint=embedder.fingerprint,
        listing=images.digest(),
        precision=embedder.precision,
    )
    shards = _unfinished(root)
    with changing(root):
        if (root / MANIFEST).exists() and not overwrite:
            made = _same(open_extraction(root), plan)
            if strict and made.skipped:
                raise _left_out_before(made.skipped[0])
            return made
        if not (overwrite or shards.begun) and _holds_others(root, shards):
            raise DataError(f"{root} holds other files: give a new folder, or --overwrite")
        done = shards.open(plan, replace=overwrite)
        if strict:
            for shard in shards:
                if shard.skipped:
                    raise _left_out_before(shard.skipped[0])
        _embed_rest(embedder, images, shards, done, workers, strict, shard_size, progress)
        return _finish(embedder, images, shards, root, plan, table)


def _unfinished(root: Path) -> ShardFolder:
    return ShardFolder(root / "unfinished")


def _holds_others(root: Path, shards: ShardFolder) -> bool:
    """Whether a folder holds what no extraction, begun and killed at once, leaves there."""
    names = {path.name for path in root.iterdir()} - {LOCK, shards.root.name}
    return bool(names) or shards.holds_others


def _same(found: Extraction, plan: Plan) -> Extraction:
    manifest = found.manifest
    made = Plan(
        fingerprint=manifest.fingerprint, listing=manifest.listing, precision=manifest.precision
    )
    different = made.difference(plan)
    if different:
        raise DataError(
            f"{found.root} holds other embeddings ({different}): give a new folder, or --overwrite"
        )
    return found


def _embed_rest(
    embedder: Embedder,
    images: ImageTable,
    shards: ShardFolder,
    done: int,
    workers: int,
    strict: bool,
    shard_size: int,
    progress: Progress | None,
) -> None:
    """Embed the images from ``done`` on and write them as shards."""
    if done == len(images):
        return
    stream = EmbeddingStream(embedder, images, start=done, workers=workers)
    start, told = done, 0
    # Places, embeddings, how many images are behind us with them, and lines about those left out.
    batches: list[tuple[NDArray[np.int64], NDArray[np.float32], int, tuple[str, ...]]] = []

    # Done twice, because Ctrl-C came in the middle, it does the same.
    def flush() -> None:
        nonlocal start, told
        places, vectors, done, skipped = zip(*batches, strict=True)
        shards.write(
            Shard(
                start=start,
                stop=done[-1],
                embeddings=np.concatenate(vectors),
                places=np.concatenate(places),
                skipped=skipped[-1][told:],
            )
        )
        batches.clear()
        start, told = done[-1], len(skipped[-1])

    try:
        for places, vectors in stream:
            if strict and stream.skipped:
                break
            batches.append((places, vectors, stream.done, stream.skipped))
            if progress is not None:
                progress(stream.done, len(images))
            if stream.done - start >= shard_size:
                flush()
    except KeyboardInterrupt:
        if batches:
            flush()
        raise KeyboardInterrupt(
            f"stopped after {start} of {len(images)} images; the same command goes on from there"
        ) from None
    if strict and stream.skipped:
        if batches:
            flush()
        raise _too_strict(stream.skipped[0])
    if stream.done < len(images):
        # The last ones cannot be read.
        nothing = np.empty(0, np.int64), np.empty((0, embedder.dimension), np.float32)
        batches.append((*nothing, len(images), stream.skipped))
    if batches:
        flush()
    if progress is not None:
        progress(len(images), len(images))


def _too_strict(line: str) -> DataError:
    return DataError(f"{line}; replace it, or go on without it by leaving out --strict")


def _left_out_before(line: str) -> DataError:
    return DataError(
        f"{line}; it was left out before: replace it and start again by --overwrite, or go on "
        "without it by leaving out --strict"
    )


def _finish(
    embedder: Embedder,
    images: ImageTable,
    shards: ShardFolder,
    root: Path,
    plan: Plan,
    table: TableFormat,
) -> Extraction:
    """Put the shards together; the manifest comes last and makes the folder valid."""
    # Twice over the shards, so that the embeddings are never all in memory.
    places: list[NDArray[np.int64]] = []
    skipped: list[str] = []
    for shard in shards:
        places.append(shard.places)
        skipped += shard.skipped
    rows = np.concatenate(places)
    if not len(rows):
        shards.clear()
        raise DataError(f"none of {len(images)} images can be read: {skipped[0]}")
    for old in (MANIFEST, "images.csv", "images.parquet", *_TEMPORARY):
        for path in root.glob(old):
            path.unlink()
    shape = (len(rows), embedder.dimension)
    write_vectors(root / EMBEDDINGS, shape, (shard.embeddings for shard in shards))
    name: TableName = "images.csv" if table == "csv" else "images.parquet"
    write_table(images.select(rows), root / name)
    manifest = ExtractionManifest(
        count=len(rows),
        dimension=embedder.dimension,
        slots=embedder.slots,
        fingerprint=plan.fingerprint,
        checkpoint=embedder.checkpoint,
        precision=plan.precision,
        listing=plan.listing,
        skipped=tuple(skipped),
        table=name,
        files={file: record_file(root / file) for file in (EMBEDDINGS, name)},
    )
    write_document(manifest, root / MANIFEST)
    shards.clear()
    return Extraction(root, manifest)
