"""Where a study keeps what, and who may write there."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gsalign.errors import ConfigError


@dataclass(frozen=True)
class StudyFolder:
    """The files of a study; its runs lie beside them, each in a folder of its own.

    Attributes:
        root: ``logs/study/<study>`` by default.
    """

    root: Path

    @property
    def table(self) -> Path:
        """All figures of all finished runs, see ``gsalign.study.rows``."""
        return self.root / "study.csv"

    @property
    def report(self) -> Path:
        """Means and spreads, in Markdown."""
        return self.root / "study.md"

    @property
    def picture(self) -> Path:
        """Every run, by protocol."""
        return self.root / "study.png"

    @property
    def curves(self) -> Path:
        """Learning curves with their spread."""
        return self.root / "curves.png"

    def run(self, variant: str, seed: int) -> Path:
        """The folder of a run."""
        return self.root / f"{variant}-seed{seed}"

    def seeds(self, variant: str) -> list[int]:
        """Seeds of a variant that have a folder."""
        pattern = re.compile(re.escape(variant) + r"-seed(\d+)")
        names = [path.name for path in self.root.glob("*-seed*")]
        return sorted(int(found[1]) for found in map(pattern.fullmatch, names) if found)

    @contextmanager
    def claimed(self) -> Iterator[int]:
        """Keep other studies out of the folder inside the block.

        Yields:
            A file descriptor. Processes that inherit it keep others out for as long as they live,
            so that a run whose study was killed is not joined by a second one in its folder.

        Raises:
            ConfigError: another study, or a run that one left behind, is at work in the folder.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.root / ".claim", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"{self.root}: another study is at work in this folder, or a run that one left "
                    "behind; wait for it, end it, or give this one another --out"
                ) from None
            yield descriptor
        finally:
            os.close(descriptor)
