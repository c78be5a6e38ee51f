"""Unfinished work of an extraction: what is embedded so far, in files that a crash leaves whole."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from gsalign.errors import DataError
from gsalign.files import atomic_write
from gsalign.search.documents import read_document, write_document
from gsalign.search.fingerprint import Fingerprint

# Files of ours and, with a dot before them, what a killed process leaves of one.
_OWN = re.compile(r"plan\.json|\d{12}\.safetensors|\.plan\..*\.json|\.\d{12}\..*\.safetensors")


class Plan(BaseModel):
    """What an extraction does; one that was stopped goes on only under the same plan."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fingerprint: Fingerprint
    listing: str
    precision: str

    def difference(self, other: Plan) -> str:
        """What differs, in words; empty where nothing does."""
        told = [self.fingerprint.difference(other.fingerprint)]
        if self.listing != other.listing:
            told.append("other images or labels")
        if self.precision != other.precision:
            told.append(f"precision {self.precision} against {other.precision}")
        return ", ".join(text for text in told if text)


@dataclass(frozen=True)
class Shard:
    """Embeddings of the images ``start .. stop`` of the listing.

    Attributes:
        start: first place.
        stop: one behind the last place.
        embeddings: float32 ``[N, D]``, of those that could be read.
        places: in the listing, int64 ``[N]``.
        skipped: a line about each of the others.
    """

    start: int
    stop: int
    embeddings: NDArray[np.float32]
    places: NDArray[np.int64]
    skipped: tuple[str, ...]


class ShardFolder:
    """Shards in a folder, each a file; together they are a beginning of the listing.

    Args:
        root: the folder; made by :meth:`open`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._plan = root / "plan.json"

    @property
    def begun(self) -> bool:
        """Whether an extraction began here and is not finished."""
        return self._plan.is_file()

    @property
    def holds_others(self) -> bool:
        """Whether files lie here that are none of ours."""
        if not self.root.is_dir():
            return self.root.exists()
        return any(not _OWN.fullmatch(path.name) for path in self.root.iterdir())

    def open(self, plan: Plan, *, replace: bool = False) -> int:
        """Begin, or go on with what is there.

        Args:
            plan: of the extraction.
            replace: remove what was made under another plan, or is damaged.

        Returns:
            The place in the listing to go on at.

        Raises:
            DataError: what is there was made under another plan, or is damaged.
        """
        if self.begun:
            try:
                return self._done(plan)
            except DataError:
                if not replace:
                    raise
        self.clear()
        write_document(plan, self._plan)
        return 0

    def _done(self, plan: Plan) -> int:
        """How many images of the listing are behind us."""
        found = read_document(Plan, self._plan, what="an unfinished extraction")
        different = found.difference(plan)
        if different:
            raise DataError(
                f"{self.root.parent} holds an unfinished extraction of something else "
                f"({different}): finish that one, or --overwrite"
            )
        done = 0
        for shard in self:
            if shard.start != done:
                raise DataError(
                    f"{self.root} lacks images {done} to {shard.start}: --overwrite starts again"
                )
            done = shard.stop
        return done

    def write(self, shard: Shard) -> None:
        """Add a shard, atomically."""
        metadata = {
            "start": str(shard.start),
            "stop": str(shard.stop),
            "skipped": json.dumps(shard.skipped),
        }
        tensors: dict[str, NDArray[Any]] = {"embeddings": shard.embeddings, "places": shard.places}
        with atomic_write(self.root / f"{shard.start:012d}.safetensors") as temporary:
            safetensors.numpy.save_file(tensors, temporary, metadata=metadata)

    def __iter__(self) -> Iterator[Shard]:
        """Yield the shards in the order of the listing.

        Raises:
            DataError: a file is damaged.
        """
        # Temporary files that a killed process left behind begin with a dot.
        for path in sorted(self.root.glob("[0-9]*.safetensors")):
            try:
                with safetensors.safe_open(path, framework="numpy") as file:
                    metadata = file.metadata()
                    yield Shard(
                        start=int(metadata["start"]),
                        stop=int(metadata["stop"]),
                        embeddings=file.get_tensor("embeddings"),
                        places=file.get_tensor("places"),
                        skipped=tuple(json.loads(metadata["skipped"])),
                    )
            except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
                raise DataError(f"{path} is damaged: {error}; --overwrite starts again") from None

    def clear(self) -> None:
        """Remove what is ours."""
        # First, so that what is left when we are killed is not taken for a beginning.
        self._plan.unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            for path in self.root.iterdir():
                if _OWN.fullmatch(path.name):
                    path.unlink()
        with suppress(OSError):
            self.root.rmdir()
