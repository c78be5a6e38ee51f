"""What lies in the folder of an index: shards of vectors with their table, and the manifest."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from gsalign import __version__
from gsalign.errors import DataError
from gsalign.search.documents import FileRecord, check_file, read_document, record_file
from gsalign.search.fingerprint import Fingerprint
from gsalign.search.table import ImageTable, read_table, write_table
from gsalign.search.vectors import open_vectors, write_vectors

Kind = Literal["exact", "hnsw", "ivfpq"]

MANIFEST = "manifest.json"
WHAT = "an index (gsalign index build makes one)"

# Files of a shard, by what is behind its name.
Suffix = Literal[".npy", ".visibility.npy", ".csv", ".faiss"]
VECTORS: Final = ".npy"
VISIBILITY: Final = ".visibility.npy"
TABLE: Final = ".csv"
GRAPH: Final = ".faiss"

# Our files but the manifest and, with a dot before them, what a killed process leaves of one.
_OWN = re.compile(
    r"shard-\d{6,}\.(npy|visibility\.npy|csv|faiss)|trained-\d{6,}\.faiss"
    r"|\.(shard|trained)-\d{6,}\..*\.(npy|csv|faiss)|\.manifest\..*\.json"
)

# Rows that are copied at a time.
BLOCK_ROWS = 8192


class IndexSettings(BaseModel):
    """How an index is made.

    Attributes:
        kind: ``"exact"`` scans every vector; ``"hnsw"`` walks a graph of neighbours over copies in
            half precision; ``"ivfpq"`` visits some of many lists of short codes. The latter two
            find a short list, which is ranked exactly.
        shard_size: images in one shard at most.
        neighbours: of ``hnsw``, edges of a node.
        construction: of ``hnsw``, candidates looked at for a node's edges.
        lists: of ``ivfpq``; 0: four times the root of the number of images.
        code_size: of ``ivfpq``, bytes of a code, a divisor of the dimension; 0: one for 8 numbers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Kind = "exact"
    shard_size: Annotated[int, Field(ge=1)] = 1_000_000
    neighbours: Annotated[int, Field(ge=2, le=512)] = 32
    construction: Annotated[int, Field(ge=1)] = 80
    lists: Annotated[int, Field(ge=0)] = 0
    code_size: Annotated[int, Field(ge=0)] = 0


class ShardRecord(BaseModel):
    """One shard, as the manifest knows it.

    Attributes:
        name: of its files, without what is behind it.
        count: number of images.
        files: by what is behind the name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^shard-\d{6,}$")]
    count: Annotated[int, Field(ge=1)]
    files: dict[Suffix, FileRecord]


class TrainedRecord(FileRecord):
    """The empty index that every shard of ``ivfpq`` starts from.

    Attributes:
        name: of the file.
    """

    name: Annotated[str, Field(pattern=r"^trained-\d{6,}\.faiss$")]


class IndexManifest(BaseModel):
    """What lies in the folder of an index; replacing this file is what changes an index.

    Attributes:
        format: of the folder.
        gsalign: the version that wrote it last.
        metric: ``"cosine"``, or ``"part cosine"`` where embeddings have several slots.
        dimension: D, length of an embedding.
        slots: how many vectors an embedding is made of.
        fingerprint: of network and preprocessing.
        checkpoint: where the network was read from, for convenience; not relied on.
        settings: how it is made.
        next_id: the id of the next image; ids are never given twice.
        next_shard: the number of the next shard.
        trained: of ``ivfpq``.
        shards: in ascending order of their ids.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["gsalign-index-1"] = "gsalign-index-1"
    gsalign: str = __version__
    metric: Literal["cosine", "part cosine"]
    dimension: Annotated[int, Field(ge=1)]
    slots: Annotated[int, Field(ge=1)]
    fingerprint: Fingerprint
    checkpoint: str = ""
    settings: IndexSettings = IndexSettings()
    next_id: Annotated[int, Field(ge=0)] = 0
    next_shard: Annotated[int, Field(ge=0)] = 0
    trained: TrainedRecord | None = None
    shards: tuple[ShardRecord, ...] = ()

    @model_validator(mode="after")
    def _fits_together(self) -> IndexManifest:
        if self.dimension % self.slots:
            raise ValueError(f"dimension {self.dimension} is no multiple of slots {self.slots}")
        if self.next_id < self.count:
            raise ValueError(f"next_id {self.next_id} was given already, to one of {self.count}")
        numbers = [int(shard.name.removeprefix("shard-")) for shard in self.shards]
        if len(set(numbers)) < len(numbers) or max(numbers, default=-1) >= self.next_shard:
            raise ValueError(f"next_shard {self.next_shard}, or another number, is of two shards")
        wanted = {VECTORS, TABLE}
        wanted |= {VISIBILITY} if self.slots > 1 else set()
        wanted |= {GRAPH} if self.settings.kind != "exact" else set()
        for shard in self.shards:
            if shard.files.keys() != wanted:
                raise ValueError(
                    f"{shard.name} has {sorted(shard.files)}; a shard of {self.settings.kind} with "
                    f"{self.slots} slots has {sorted(wanted)}"
                )
        if self.shards and (self.trained is None) == (self.settings.kind == "ivfpq"):
            raise ValueError("a trained index belongs to ivfpq, and to no other kind")
        return self

    @property
    def count(self) -> int:
        """Number of images."""
        return sum(shard.count for shard in self.shards)

    def file_names(self) -> set[str]:
        """All files that belong to the index, the manifest but not the lock."""
        names = {shard.name + suffix for shard in self.shards for suffix in shard.files}
        return names | {MANIFEST} | ({self.trained.name} if self.trained else set())


@dataclass(frozen=True)
class Piece:
    """Rows on their way into a shard.

    Attributes:
        ids: int64 ``[N]``, ascending.
        images: paths and labels.
        vectors: float32 ``[N, D]``, perhaps mapped.
        rows: which rows of ``vectors``, int64 ``[N]``.
    """

    ids: NDArray[np.int64]
    images: ImageTable
    vectors: NDArray[np.float32]
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def part(self, start: int, stop: int) -> Piece:
        """Some of the rows."""
        places = np.arange(start, min(stop, len(self)))
        return Piece(self.ids[places], self.images.select(places), self.vectors, self.rows[places])

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """The vectors, a block after the other."""
        for start in range(0, len(self), BLOCK_ROWS):
            yield self.vectors[self.rows[start : start + BLOCK_ROWS]]


@dataclass(frozen=True)
class IndexShard:
    """One shard of an open index.

    Attributes:
        root: the index's folder.
        record: from the manifest.
        dimension: length of an embedding.
        slots: how many vectors it is made of.
    """

    root: Path
    record: ShardRecord
    dimension: int
    slots: int

    def __len__(self) -> int:
        """Return the number of images."""
        return self.record.count

    def path(self, suffix: Suffix) -> Path:
        """One of its files."""
        return self.root / (self.record.name + suffix)

    @cached_property
    def vectors(self) -> NDArray[np.float32]:
        """float32 ``[N, D]``, mapped."""
        return open_vectors(self.path(VECTORS), (len(self), self.dimension))

    @cached_property
    def visibility(self) -> NDArray[np.float32]:
        """float32 ``[N, slots]``, see :func:`slot_visibility`; mapped."""
        if self.slots == 1:
            return np.ones((len(self), 1), np.float32)
        return open_vectors(self.path(VISIBILITY), (len(self), self.slots))

    @cached_property
    def _table(self) -> tuple[ImageTable, NDArray[np.int64]]:
        images, ids = read_table(self.path(TABLE))
        if ids is None or len(images) != len(self) or not (np.diff(ids) > 0).all():
            raise DataError(
                f"{self.path(TABLE)} does not fit the manifest: the index is damaged, build it "
                "again"
            )
        return images, ids

    @property
    def images(self) -> ImageTable:
        """Paths and labels."""
        return self._table[0]

    @property
    def ids(self) -> NDArray[np.int64]:
        """int64 ``[N]``, ascending."""
        return self._table[1]

    def as_piece(self, keep: NDArray[np.bool_] | None = None) -> Piece:
        """The shard, or the rows of it that are kept, on the way into another."""
        rows = np.arange(len(self)) if keep is None else np.flatnonzero(keep)
        return Piece(self.ids[rows], self.images.select(rows), self.vectors, rows)

    def check(self, *, content: bool = False) -> None:
        """Compare the files with the manifest, by size or by content.

        Raises:
            DataError: one differs.
        """
        for suffix, record in self.record.files.items():
            # The table is small and read as a whole anyhow.
            check_file(self.path(suffix), record, content=content or suffix == TABLE)


def slot_visibility(vectors: NDArray[np.float32], slots: int) -> NDArray[np.float32]:
    """How visible the parts of embeddings are, up to one factor for each embedding.

    A slot of an embedding is as long as the root of its visibility (``PartEmbeddings.flat``), and
    the whole is then made a unit vector. That factor leaves the part distance as it is: it is the
    same in all weights of one image.

    Args:
        vectors: ``[N, D]``.
        slots: how many vectors an embedding is made of; divides D.

    Returns:
        float32 ``[N, slots]``.
    """
    squares = np.square(vectors.reshape(len(vectors), slots, -1), dtype=np.float32)
    total: NDArray[np.float32] = squares.sum(axis=2)
    return total


def write_shard(root: Path, name: str, pieces: Sequence[Piece], slots: int) -> ShardRecord:
    """Write vectors and table of a shard; an index over the vectors is another's to add.

    Args:
        root: the index's folder.
        name: of the shard; its files must not exist.
        pieces: what goes into it, ids ascending.
        slots: how many vectors an embedding is made of.
    """
    count, dimension = sum(len(piece) for piece in pieces), pieces[0].vectors.shape[1]
    suffixes: tuple[Suffix, ...] = (VECTORS, VISIBILITY, TABLE)
    paths = {suffix: root / (name + suffix) for suffix in suffixes}
    visibility: list[NDArray[np.float32]] = []

    def blocks() -> Iterator[NDArray[np.float32]]:
        for piece in pieces:
            for block in piece.blocks():
                if slots > 1:
                    visibility.append(slot_visibility(block, slots))
                yield block

    write_vectors(paths[VECTORS], (count, dimension), blocks())
    if slots > 1:
        write_vectors(paths[VISIBILITY], (count, slots), visibility)
    else:
        del paths[VISIBILITY]
    ids = np.concatenate([piece.ids for piece in pieces])
    write_table(ImageTable.concatenate([p.images for p in pieces]), paths[TABLE], ids=ids)
    files = {suffix: record_file(path) for suffix, path in paths.items()}
    return ShardRecord(name=name, count=count, files=files)


@contextmanager
def discarding(root: Path) -> Iterator[None]:
    """Remove what the block wrote into the folder of an index if it fails.

    Else files that could not be completed would go on filling a disk that is full already.
    """
    try:
        yield
    except BaseException:
        with suppress(DataError, OSError):
            remove_strays(root)
        raise


def remove_strays(root: Path) -> None:
    """Remove files of an index that are not in the manifest (any more).

    Raises:
        DataError: the manifest cannot be read.
    """
    belonging: set[str] = set()
    if (root / MANIFEST).exists():
        belonging = read_document(IndexManifest, root / MANIFEST, what=WHAT).file_names()
    for path in root.iterdir():
        if _OWN.fullmatch(path.name) and path.name not in belonging:
            path.unlink(missing_ok=True)


def next_shard(root: Path) -> int:
    """One behind the highest number of a file in the folder of an index."""
    found = (re.match(r"(?:shard|trained)-(\d+)\.", path.name) for path in root.iterdir())
    return 1 + max((int(match[1]) for match in found if match), default=-1)
