"""Which images one means: folders, tables, lists and single files to one table."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from PIL import Image

from gsalign.data import VIEW_NAMES
from gsalign.data.cargo import parse_name
from gsalign.errors import DataError
from gsalign.search.table import ImageTable, read_table

Names = Literal["plain", "cargo"]

TABLES = (".csv", ".parquet")


def list_images(sources: Iterable[str | os.PathLike[str]], *, names: Names = "plain") -> ImageTable:
    """List the images that some sources name, each file once.

    Args:
        sources: folders, searched with all below them, in the order of their names; tables
            (``.csv``, ``.parquet``, see :func:`gsalign.search.read_table`); lists (``.txt``, a path
            a line, relative ones from the list's folder); image files. Hidden files count nowhere.
        names: what the names of files in folders and lists say: ``"plain"`` nothing, ``"cargo"``
            identity, camera and view, as ``Cam2_day_2519_320.jpg``.

    Returns:
        The images with absolute paths. They are not opened; whether a file of a table or list is
        there, and an image, shows when it is read.

    Raises:
        DataError: a source does not exist, holds no images, or is no table; a name is not UTF-8, or
            not of the form that ``names`` says.
    """
    tables = [_list_source(Path(source), names) for source in sources]
    table = ImageTable.concatenate(tables)
    if not len(table):
        raise DataError("no images: give a folder, a table (.csv), a list (.txt) or image files")
    first: dict[str, int] = {}
    for row, path in enumerate(table.paths):
        first.setdefault(path, row)
    return table if len(first) == len(table) else table.select(first.values())


def _list_source(source: Path, names: Names) -> ImageTable:
    if source.is_dir():
        files = _images_below(source)
        if not files:
            raise DataError(f"folder {source} holds no images")
        return _labelled(files, names)
    if not source.exists():
        raise DataError(f"{source} does not exist; wanted a folder, a table, a list or an image")
    if source.suffix.lower() in TABLES:
        table, _ = read_table(source)
        if not len(table):
            raise DataError(f"table {source} has no rows")
        return table
    if source.suffix.lower() == ".txt":
        return _labelled(_read_list(source), names)
    return _labelled([source], names)


def _images_below(folder: Path) -> list[Path]:
    Image.init()
    suffixes = {suffix for suffix, kind in Image.EXTENSION.items() if kind in Image.OPEN}
    found: list[Path] = []

    def complain(error: OSError) -> None:
        raise DataError(f"folder {error.filename} cannot be read: {error.strerror}")

    for root, folders, files in os.walk(folder, onerror=complain):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            Path(root, name)
            for name in sorted(files)
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes
        ]
    return found


def _read_list(path: Path) -> list[Path]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"list {path} cannot be read: {error}") from None
    files = [path.parent / line for line in lines if line.strip()]
    if not files:
        raise DataError(f"list {path} names no image")
    return files


def _labelled(files: list[Path], names: Names) -> ImageTable:
    paths = tuple(os.path.abspath(file) for file in files)
    for path in paths:
        try:
            path.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"the name of {os.fsencode(path)!r} is not UTF-8, so no table can hold it: rename "
                "the file"
            ) from None
    label: Callable[[Path], tuple[str, str, str]] = _cargo if names == "cargo" else _plain
    rows = [label(file) for file in files]
    identities, cameras, views = zip(*rows, strict=True)
    return ImageTable(paths, identities, cameras, views)


def _plain(_: Path) -> tuple[str, str, str]:
    return "", "", ""


def _cargo(file: Path) -> tuple[str, str, str]:
    try:
        record = parse_name(file.name)
    except ValueError as error:
        raise DataError(f"{file} is no name of CARGO: {error}") from None
    return str(record.identity), str(record.camera), VIEW_NAMES[record.view]
