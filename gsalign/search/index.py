"""SearchIndex: embeddings in a folder, to be searched, added to and removed from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsalign.errors import ConfigError, DataError
from gsalign.extras import import_extra
from gsalign.search import approximate
from gsalign.search.answers import Filter, Hit, best_of_each_identity
from gsalign.search.budget import build_bytes, require_memory, training_rows
from gsalign.search.changing import LOCK, changing
from gsalign.search.documents import check_file, read_document, write_document
from gsalign.search.extraction import Extraction
from gsalign.search.fingerprint import Fingerprint
from gsalign.search.index_files import (
    GRAPH,
    MANIFEST,
    WHAT,
    IndexManifest,
    IndexSettings,
    IndexShard,
    Piece,
    ShardRecord,
    TrainedRecord,
    discarding,
    next_shard,
    remove_strays,
    write_shard,
)
from gsalign.search.nearest import Found, distances_to, merge, nearest
from gsalign.search.table import ImageTable

# A shard of which a filter leaves fewer images than this is scanned: that is exact, and quicker
# than a walk that has to pass over most of what it meets.
SCAN_BELOW = 10_000


class SearchIndex:
    """An index in a folder: made by :meth:`build`, opened by :meth:`open`.

    Embeddings are stored as they are and mapped into memory; every answer is ranked by exact
    distances to them: 1 - cosine, or the part distance where a network has parts. The kinds
    ``hnsw`` and ``ivfpq`` find by FAISS which images are ranked, ``exact`` ranks all. A change is
    written beside the old files and becomes valid at once, so that a crash leaves the index as it
    was; one process at a time may change an index, others may search it meanwhile.

    Attributes:
        root: the folder.
        manifest: what lies in it.
    """

    def __init__(self, root: Path, manifest: IndexManifest) -> None:
        self.root = root
        self._take(manifest)

    def _take(self, manifest: IndexManifest) -> None:
        self.manifest = manifest
        self._shards = tuple(
            IndexShard(self.root, record, manifest.dimension, manifest.slots)
            for record in manifest.shards
        )
        self._graph = lru_cache(maxsize=None)(self._read_graph)

    def _read_graph(self, number: int) -> Any:
        shard = self._shards[number]
        return approximate.read(shard.path(GRAPH), shard.record.files[GRAPH])

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> SearchIndex:
        """Open an index; sizes of all files and hashes of the tables are compared.

        Raises:
            DataError: it is none, or it is damaged.
        """
        root = Path(folder)
        index = cls(root, read_document(IndexManifest, root / MANIFEST, what=WHAT))
        for shard in index._shards:
            shard.check()
        return index

    @classmethod
    def build(
        cls,
        sources: Extraction | Sequence[Extraction],
        folder: str | os.PathLike[str],
        settings: IndexSettings | None = None,
        *,
        overwrite: bool = False,
        force: bool = False,
    ) -> SearchIndex:
        """Make an index of embeddings.

        Args:
            sources: the embeddings, all of one fingerprint.
            folder: where to; made if missing.
            settings: how; None: an exact index.
            overwrite: replace an index in the folder.
            force: go on even if the memory will probably not do.

        Raises:
            DataError: the folder holds something else, sources do not fit together, an image is in
                two of them, or there are too few for ``ivfpq``.
            ConfigError: ``settings.code_size`` does not divide the dimension.
            MemoryLimitError: it would not fit into the memory.
            MissingExtraError: the kind needs FAISS, which is not installed.
        """
        settings = IndexSettings() if settings is None else settings
        sources = [sources] if isinstance(sources, Extraction) else list(sources)
        if not sources:
            raise DataError("sources is empty: there is nothing to index")
        root = Path(folder)
        first = sources[0].manifest
        count = sum(len(source) for source in sources)
        if settings.kind != "exact":
            import_extra("faiss")
        size = approximate.code_size(settings, first.dimension) if settings.kind == "ivfpq" else 0
        needed = build_bytes(settings, count, first.dimension, size)
        if not force:
            require_memory(
                needed,
                f"{settings.kind} over {count} embeddings of {first.dimension} numbers",
                "take a smaller --shard-size or another --kind, or --force it",
            )
        with changing(root):
            if not overwrite and any(path.name != LOCK for path in root.iterdir()):
                raise DataError(f"{root} holds other files: give a new folder, or --overwrite")
            manifest = IndexManifest(
                metric="cosine" if first.slots == 1 else "part cosine",
                dimension=first.dimension,
                slots=first.slots,
                fingerprint=first.fingerprint,
                checkpoint=first.checkpoint,
                settings=settings,
                # Names of the index that is replaced are not used again while it is in force.
                next_shard=next_shard(root),
            )
            index = cls(root, manifest)
            with discarding(root):
                pieces = index._pieces(sources)
                if settings.kind == "ivfpq":
                    manifest = index._train(pieces, manifest)
                index._commit(index._append(pieces, manifest))
        return index

    def __len__(self) -> int:
        """Return the number of images."""
        return self.manifest.count

    @property
    def fingerprint(self) -> Fingerprint:
        """Of the network and the preprocessing that made the embeddings."""
        return self.manifest.fingerprint

    @property
    def images(self) -> ImageTable:
        """Paths and labels of all images, in ascending order of their ids."""
        return ImageTable.concatenate([shard.images for shard in self._shards])

    @property
    def ids(self) -> NDArray[np.int64]:
        """Ids of all images, int64 ``[N]``, ascending."""
        return np.concatenate([np.empty(0, np.int64), *(shard.ids for shard in self._shards)])

    def require(self, made_by: Fingerprint) -> None:
        """Make sure that embeddings can be compared with those of the index.

        Raises:
            DataError: they were made by another network or preprocessing.
        """
        different = self.fingerprint.difference(made_by)
        if different:
            raise DataError(
                f"{self.root} is an index of another model or preprocessing ({different}): search "
                "it with what it was made by, or extract and build anew"
            )

    def verify(self) -> None:
        """Compare every file with its hash, which reads them all.

        Raises:
            DataError: one differs.
        """
        for shard in self._shards:
            shard.check(content=True)
        if self.manifest.trained is not None:
            check_file(self.root / self.manifest.trained.name, self.manifest.trained)

    # Changing.

    def add(self, source: Extraction, *, replace: bool = False) -> None:
        """Add embeddings; ids go on where they were.

        Args:
            source: the embeddings.
            replace: an image whose path is in the index already takes the place of that one, under
                a new id; else it is an error.

        Raises:
            DataError: they were made by another model, or images are in the index already.
            MissingExtraError: the kind needs FAISS, which is not installed.
        """
        with self._changing():
            self._fits(source)
            known = set(source.images.paths)
            double = [path for path in self.images.paths if path in known]
            if double and not replace:
                raise DataError(
                    f"{len(double)} of {len(source)} images are in {self.root} already, the first "
                    f"is {double[0]}: --replace puts the new in their place"
                )
            manifest = self._without(lambda path, identity, number: path in known)
            pieces = self._pieces([source])
            # Many small additions would leave many small shards; each image moves only as often as
            # its shard doubles.
            shards = list(manifest.shards)
            total = len(source)
            joined: list[Piece] = []
            while (
                shards
                and shards[-1].count <= 2 * total
                and total + shards[-1].count <= manifest.settings.shard_size
            ):
                record = shards.pop()
                total += record.count
                last = IndexShard(self.root, record, manifest.dimension, manifest.slots)
                joined.insert(0, last.as_piece())
            manifest = manifest.model_copy(update={"shards": tuple(shards)})
            self._commit(self._append([*joined, *pieces], manifest))

    def remove(
        self,
        *,
        paths: Iterable[str | os.PathLike[str]] = (),
        identities: Iterable[str] = (),
        ids: Iterable[int] = (),
    ) -> int:
        """Remove images: their vectors and labels leave the disk.

        Args:
            paths: files; relative ones from here.
            identities: every image of these people.
            ids: numbers of images.

        Returns:
            How many images were removed.

        Raises:
            DataError: a path, identity or id is not in the index; nothing is removed then.
            MissingExtraError: the kind needs FAISS, which is not installed.
        """
        wanted: dict[str, set[Any]] = {
            "path": {os.path.abspath(path) for path in paths},
            "identity": {identity for identity in identities if identity},
            "id": {int(number) for number in ids},
        }
        with self._changing():
            images = self.images
            known: dict[str, set[Any]] = {
                "path": set(images.paths),
                "identity": set(images.identities),
                "id": set(self.ids.tolist()),
            }
            for name, values in wanted.items():
                missing = values - known[name]
                if missing:
                    some = sorted(map(str, missing))[:3]
                    raise DataError(f"{self.root} has no image with {name} {' or '.join(some)}")
            before = len(self)
            manifest = self._without(
                lambda path, identity, number: (
                    path in wanted["path"]
                    or identity in wanted["identity"]
                    or number in wanted["id"]
                )
            )
            if manifest.count != before:
                self._commit(manifest)
            return before - manifest.count

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with changing(self.root):
            # Another process may have changed it since it was opened.
            self._take(read_document(IndexManifest, self.root / MANIFEST, what=WHAT))
            if self.manifest.settings.kind != "exact":
                import_extra("faiss")
            with discarding(self.root):
                yield

    def _pieces(self, sources: Sequence[Extraction]) -> list[Piece]:
        """Sources that fit the index and each other, numbered on from the last id."""
        pieces, start = [], self.manifest.next_id
        seen: set[str] = set()
        for source in sources:
            self._fits(source)
            paths = source.images.paths
            double = [path for path in paths if path in seen]
            if double:
                raise DataError(
                    f"{len(double)} images are in two of the sources, the first is {double[0]}: "
                    "leave one of the sources out"
                )
            seen.update(paths)
            rows = np.arange(len(source))
            pieces.append(Piece(start + rows, source.images, source.embeddings, rows))
            start += len(source)
        return pieces

    def _fits(self, source: Extraction) -> None:
        self.require(source.manifest.fingerprint)
        found = (source.manifest.dimension, source.manifest.slots)
        wanted = (self.manifest.dimension, self.manifest.slots)
        if found != wanted:
            raise DataError(
                f"{source.root} has embeddings of {found[0]} numbers in {found[1]} parts, "
                f"{self.root} of {wanted[0]} in {wanted[1]}"
            )

    def _train(self, pieces: Sequence[Piece], manifest: IndexManifest) -> IndexManifest:
        count = sum(len(piece) for piece in pieces)
        chosen = np.random.default_rng(0).permutation(count)
        chosen = np.sort(chosen[: training_rows(manifest.settings, count)])
        sample, start = [], 0
        for piece in pieces:
            mine = chosen[(chosen >= start) & (chosen < start + len(piece))] - start
            sample.append(piece.vectors[piece.rows[mine]])
            start += len(piece)
        trained = approximate.train(manifest.settings, np.concatenate(sample), count)
        name = f"trained-{manifest.next_shard:06d}.faiss"
        written = approximate.write(trained, self.root / name)
        record = TrainedRecord(name=name, **written.model_dump())
        return manifest.model_copy(update={"trained": record})

    def _append(self, pieces: Sequence[Piece], manifest: IndexManifest) -> IndexManifest:
        """Write pieces as new shards behind those of a manifest."""
        shards, number = list(manifest.shards), manifest.next_shard
        for group in _in_shards(pieces, manifest.settings.shard_size):
            shards.append(self._write_shard(f"shard-{number:06d}", group, manifest))
            number += 1
        return manifest.model_copy(
            update={
                "shards": tuple(shards),
                "next_shard": number,
                "next_id": max([manifest.next_id, *(int(p.ids[-1]) + 1 for p in pieces if len(p))]),
            }
        )

    def _write_shard(
        self, name: str, pieces: Sequence[Piece], manifest: IndexManifest
    ) -> ShardRecord:
        record = write_shard(self.root, name, pieces, manifest.slots)
        if manifest.settings.kind == "exact":
            return record
        trained = None
        if manifest.trained is not None:
            trained = approximate.read(self.root / manifest.trained.name, manifest.trained)
        blocks = (block for piece in pieces for block in piece.blocks())
        graph = approximate.fill(manifest.settings, trained, blocks, manifest.dimension)
        written = approximate.write(graph, self.root / (name + GRAPH))
        return record.model_copy(update={"files": {**record.files, GRAPH: written}})

    def _without(self, drop: Callable[[str, str, int], bool]) -> IndexManifest:
        """A manifest without some images; shards that held one are written anew."""
        shards, number = [], self.manifest.next_shard
        for shard in self._shards:
            rows = zip(shard.images.paths, shard.images.identities, shard.ids.tolist(), strict=True)
            keep = np.array([not drop(*row) for row in rows], bool)
            if keep.all():
                shards.append(shard.record)
            elif keep.any():
                name = f"shard-{number:06d}"
                shards.append(self._write_shard(name, [shard.as_piece(keep)], self.manifest))
                number += 1
        return self.manifest.model_copy(update={"shards": tuple(shards), "next_shard": number})

    def _commit(self, manifest: IndexManifest) -> None:
        write_document(manifest, self.root / MANIFEST)
        self._take(manifest)
        remove_strays(self.root)

    # Searching.

    def search(
        self,
        queries: NDArray[np.float32],
        k: int = 10,
        *,
        only: Filter | None = None,
        by_identity: bool = False,
        exact: bool = False,
        shortlist: int = 0,
        effort: int = 0,
        made_by: Fingerprint | None = None,
    ) -> list[tuple[Hit, ...]]:
        """The k nearest images of every query, or the k nearest people.

        Args:
            queries: embeddings, float32 ``[Q, D]``, as :class:`gsalign.search.Embedder` makes them.
            k: how many; fewer come back where there are fewer.
            only: which images count.
            by_identity: of every identity only the nearest image; images without an identity stand
                for themselves.
            exact: rank all images, whatever the kind of the index.
            shortlist: candidates that an approximate index puts up for exact ranking, in each
                shard; 0: ten times k, and 100 at least.
            effort: how far it looks, see ``gsalign.search.approximate.candidates``; 0 chooses.
            made_by: fingerprint of the queries, to be compared with the index's.

        Returns:
            For every query its hits, the nearest first; of equal distances the lower id.

        Raises:
            DataError: the queries are not as above, or made by another model; an index file is
                damaged.
            ConfigError: a number is out of its range.
            MissingExtraError: the kind needs FAISS, which is not installed.
        """
        if made_by is not None:
            self.require(made_by)
        for name, value, least in (("k", k, 1), ("shortlist", shortlist, 0), ("effort", effort, 0)):
            if value < least:
                raise ConfigError(f"{name} is {value}; wanted {least} or more")
        queries = np.asarray(queries)
        if queries.ndim != 2 or queries.shape[1] != self.manifest.dimension:
            raise DataError(
                f"queries are {list(queries.shape)}; wanted [Q, {self.manifest.dimension}]"
            )
        queries = np.ascontiguousarray(queries, np.float32)
        if not np.isfinite(queries).all():
            raise DataError("queries hold numbers that are not finite")
        masks = [None if only is None else only.mask(shard.images) for shard in self._shards]
        available = sum(
            len(shard) if mask is None else int(mask.sum())
            for shard, mask in zip(self._shards, masks, strict=True)
        )
        if by_identity:
            k = min(k, self._number_of_identities(masks))
        wanted = k
        while True:
            count = min(wanted, available)
            some = max(shortlist or max(10 * count, 100), count)
            found = self._find(queries, count, masks, exact, some, effort)
            answers = [
                self._hits(distances, numbers) for distances, numbers in zip(*found, strict=True)
            ]
            if not by_identity:
                return answers
            grouped = [best_of_each_identity(hits, k) for hits in answers]
            if count == available or all(len(hits) == k for hits in grouped):
                return grouped
            wanted *= 4

    def recall(
        self,
        queries: NDArray[np.float32],
        k: int = 10,
        *,
        only: Filter | None = None,
        shortlist: int = 0,
        effort: int = 0,
    ) -> float:
        """Share of the k truly nearest that :meth:`search` finds, over all queries, 0 to 1.

        Arguments and errors are those of :meth:`search`.
        """
        right = self.search(queries, k, only=only, exact=True)
        found = self.search(queries, k, only=only, shortlist=shortlist, effort=effort)
        total = sum(len(hits) for hits in right)
        same = sum(
            len({hit.id for hit in one} & {hit.id for hit in two})
            for one, two in zip(right, found, strict=True)
        )
        return same / total if total else 1.0

    def sample(self, count: int) -> NDArray[np.float32]:
        """Some of the stored embeddings, spread evenly: float32 ``[count or fewer, D]``."""
        places = np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).astype(np.int64))
        starts = np.cumsum([0, *(len(shard) for shard in self._shards)])
        chosen = [
            shard.vectors[places[(places >= start) & (places < start + len(shard))] - start]
            for shard, start in zip(self._shards, starts, strict=False)
        ]
        return np.concatenate([np.empty((0, self.manifest.dimension), np.float32), *chosen])

    def blocks(
        self, rows: int
    ) -> Iterator[tuple[NDArray[np.int64], ImageTable, NDArray[np.float32]]]:
        """All of it in order, so many rows at a time: ids, labels and vectors."""
        for shard in self._shards:
            for start in range(0, len(shard), rows):
                part = np.arange(start, min(start + rows, len(shard)))
                yield shard.ids[part], shard.images.select(part), shard.vectors[part]

    def _number_of_identities(self, masks: Sequence[NDArray[np.bool_] | None]) -> int:
        """Different identities among the images that count, those without one by themselves."""
        known: set[object] = set()
        for shard, mask in zip(self._shards, masks, strict=True):
            rows = np.arange(len(shard)) if mask is None else np.flatnonzero(mask)
            identities, ids = shard.images.identities, shard.ids
            known.update(identities[row] or int(ids[row]) for row in rows)
        return len(known)

    def _find(
        self,
        queries: NDArray[np.float32],
        k: int,
        masks: Sequence[NDArray[np.bool_] | None],
        exact: bool,
        shortlist: int,
        effort: int,
    ) -> Found:
        """Distances and places in the whole index, ``[Q, k]``."""
        found: Found = (
            np.empty((len(queries), 0), np.float32),
            np.empty((len(queries), 0), np.int64),
        )
        start = 0
        for number, (shard, mask) in enumerate(zip(self._shards, masks, strict=True)):
            few = mask is not None and int(mask.sum()) < SCAN_BELOW
            if exact or few or self.manifest.settings.kind == "exact":
                distances, rows = nearest(queries, shard, k, mask)
            else:
                graph = self._graph(number)
                distances, rows = self._rank_candidates(
                    queries,
                    shard,
                    approximate.candidates(graph, queries, shortlist, effort, mask),
                )
            found = merge([found, (distances, np.where(rows < 0, _NOWHERE, rows + start))], k)
            start += len(shard)
        return found

    @staticmethod
    def _rank_candidates(
        queries: NDArray[np.float32], shard: IndexShard, lists: Sequence[NDArray[np.int64]]
    ) -> Found:
        """Exact distances of each query's candidates; infinity where it has fewer than others."""
        most = max((len(rows) for rows in lists), default=0)
        distances = np.full((len(queries), most), np.inf, np.float32)
        places = np.full((len(queries), most), -1, np.int64)
        for number, rows in enumerate(lists):
            if len(rows):
                distances[number, : len(rows)] = distances_to(queries[number], shard, rows)
                places[number, : len(rows)] = rows
        return distances, places

    def _hits(self, distances: NDArray[np.float32], places: NDArray[np.int64]) -> tuple[Hit, ...]:
        starts = np.cumsum([0, *(len(shard) for shard in self._shards)])
        hits = []
        for distance, place in zip(distances.tolist(), places.tolist(), strict=True):
            if place == _NOWHERE:
                continue
            number = int(np.searchsorted(starts, place, side="right")) - 1
            shard, row = self._shards[number], place - int(starts[number])
            images = shard.images
            hits.append(
                Hit(
                    id=int(shard.ids[row]),
                    distance=max(distance, 0.0),
                    path=images.paths[row],
                    identity=images.identities[row],
                    camera=images.cameras[row],
                    view=images.views[row],
                )
            )
        return tuple(hits)


# The place of what was not found; behind every real one where distances are equal.
_NOWHERE = np.iinfo(np.int64).max


def _in_shards(pieces: Sequence[Piece], size: int) -> Iterator[list[Piece]]:
    """Pieces cut and grouped into shards of a size; only the last is smaller."""
    group: list[Piece] = []
    room = size
    for piece in pieces:
        start = 0
        while start < len(piece):
            part = piece.part(start, start + room)
            group.append(part)
            start += len(part)
            room -= len(part)
            if not room:
                yield group
                group, room = [], size
    if group:
        yield group
