"""Reading and writing the JSON documents that say what lies in a folder of ours."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from gsalign.errors import DataError
from gsalign.files import atomic_write

Document = TypeVar("Document", bound=BaseModel)

_CHUNK = 2**20


class FileRecord(BaseModel):
    """A file that a document vouches for.

    Attributes:
        bytes: its size.
        sha256: of its content.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int
    sha256: str


def record_file(path: Path) -> FileRecord:
    """Size and hash of a file as it is."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    return FileRecord(bytes=path.stat().st_size, sha256=state.hexdigest())


def check_file(path: Path, record: FileRecord, *, content: bool = True) -> None:
    """Compare a file with what a document says of it.

    Args:
        path: the file.
        record: from the document.
        content: compare the hash too, which reads the file; else the size alone.

    Raises:
        DataError: the file is missing or differs.
    """
    if not path.is_file():
        raise DataError(
            f"{path} is missing: the folder was changed meanwhile (open it again) or is damaged "
            "(make it again)"
        )
    size = path.stat().st_size
    if size != record.bytes:
        raise DataError(
            f"{path} has {size} bytes, {record.bytes} were written: the folder is damaged, make "
            "it again"
        )
    if content and record_file(path).sha256 != record.sha256:
        raise DataError(
            f"{path} is not the file that was written (its sha256 differs): the folder is damaged, "
            "make it again"
        )


def write_document(document: BaseModel, path: Path) -> None:
    """Write a document as JSON, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(document.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_document(kind: type[Document], path: Path, *, what: str) -> Document:
    """Read a document.

    Args:
        kind: its model.
        path: the JSON file.
        what: what the folder is, for messages.

    Raises:
        DataError: the file is missing, or no document of this kind.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path.parent} is not {what}: it has no {path.name}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(str(part) for part in fault["loc"]) or "the document"
        raise DataError(
            f"{path.parent} is not {what}: {path.name}, {place}: {fault['msg']}"
        ) from None
