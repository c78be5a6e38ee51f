"""Keeping two processes from changing one folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gsalign.errors import DataError

LOCK = ".lock"


@contextmanager
def changing(root: Path) -> Iterator[None]:
    """Keep other processes from changing a folder inside the block; it is made if missing.

    Raises:
        DataError: another process is changing it.
    """
    root.mkdir(parents=True, exist_ok=True)
    path = root / LOCK
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have removed it since we opened it; then it locks nobody out.
            ours = os.path.samestat(os.fstat(lock), path.stat())
        except (BlockingIOError, FileNotFoundError):
            ours = False
        if not ours:
            raise DataError(f"another process is changing {root}: wait for it to end")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            # Closing would not do: worker processes that were forked meanwhile have a copy.
            fcntl.flock(lock, fcntl.LOCK_UN)
    finally:
        os.close(lock)
