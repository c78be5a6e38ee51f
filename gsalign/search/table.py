"""The images of a collection with their labels: a table in memory, and as CSV or parquet."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gsalign.csv_rows import csv_rows
from gsalign.errors import DataError
from gsalign.extras import import_extra
from gsalign.files import atomic_write

LABELS = ("identity", "camera", "view")
VIEWS = ("", "aerial", "ground")
TableFormat = Literal["csv", "parquet"]


@dataclass(frozen=True)
class ImageTable:
    """Images and what is known of them. Labels are texts; an empty one is not known.

    Attributes:
        paths: the files, absolute.
        identities: names or numbers of the people.
        cameras: names or numbers of the cameras.
        views: ``"aerial"``, ``"ground"`` or empty.
    """

    paths: tuple[str, ...] = ()
    identities: tuple[str, ...] = ()
    cameras: tuple[str, ...] = ()
    views: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        columns = (self.paths, self.identities, self.cameras, self.views)
        if len({len(column) for column in columns}) != 1:
            raise ValueError(
                "paths, identities, cameras and views must be equally long, got "
                f"{', '.join(str(len(column)) for column in columns)}"
            )

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.paths)

    def select(self, rows: Iterable[int] | NDArray[np.int64]) -> ImageTable:
        """The images in these rows, in this order."""
        places = [int(row) for row in rows]
        return ImageTable(
            tuple(self.paths[place] for place in places),
            tuple(self.identities[place] for place in places),
            tuple(self.cameras[place] for place in places),
            tuple(self.views[place] for place in places),
        )

    @staticmethod
    def concatenate(tables: Sequence[ImageTable]) -> ImageTable:
        """All rows of some tables, one table after the other."""
        return ImageTable(
            tuple(path for table in tables for path in table.paths),
            tuple(identity for table in tables for identity in table.identities),
            tuple(camera for table in tables for camera in table.cameras),
            tuple(view for table in tables for view in table.views),
        )

    def digest(self) -> str:
        """A fingerprint of the whole table, 64 hexadecimal digits."""
        state = hashlib.sha256()
        for row in zip(self.paths, self.identities, self.cameras, self.views, strict=True):
            # No text holds a NUL, so no two tables are written alike.
            state.update("\0".join((*row, "")).encode())
        return state.hexdigest()


def write_table(table: ImageTable, path: Path, *, ids: NDArray[np.int64] | None = None) -> None:
    """Write a table, by the suffix as CSV or parquet, atomically.

    Args:
        table: the images.
        path: ``.csv`` or ``.parquet``.
        ids: a first column of numbers, ``[N]``.

    Raises:
        MissingExtraError: parquet without pyarrow.
    """
    columns: dict[str, Sequence[object]] = {} if ids is None else {"id": ids.tolist()}
    columns |= {
        "path": table.paths,
        "identity": table.identities,
        "camera": table.cameras,
        "view": table.views,
    }
    with atomic_write(path) as temporary:
        if path.suffix == ".parquet":
            arrow = import_extra("pyarrow")
            parquet = import_extra("pyarrow.parquet")
            types = {"id": arrow.int64()}
            arrays = {
                name: arrow.array(values, types.get(name, arrow.string()))
                for name, values in columns.items()
            }
            parquet.write_table(arrow.table(arrays), temporary)
            return
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))


def read_table(path: str | os.PathLike[str]) -> tuple[ImageTable, NDArray[np.int64] | None]:
    """Read a table of images.

    Args:
        path: CSV or parquet with a column ``path`` and, where known, ``identity``, ``camera``,
            ``view`` (aerial or ground) and ``id``; other columns are passed over. Relative paths
            start at the table's folder.

    Returns:
        The table, and its ids ``[N]`` or None.

    Raises:
        DataError: the file is missing or no such table; the line is named.
        MissingExtraError: parquet without pyarrow.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"table {path} does not exist")
    columns = _read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    if "path" not in columns:
        raise DataError(
            f"table {path} has no column 'path', but {', '.join(columns) or 'nothing'}; wanted "
            "path and, where known, identity, camera, view"
        )
    count = len(columns["path"])
    folder = path.parent.absolute()
    labels = {name: columns.get(name, [""] * count) for name in LABELS}
    for place, (file, view) in enumerate(zip(columns["path"], labels["view"], strict=True)):
        where = f"table {path}, row {place + 1}"
        if not file or "\0" in file:
            raise DataError(f"{where}: path is {file!r}; wanted the path of an image")
        if view not in VIEWS:
            raise DataError(f"{where}: view is {view!r}; wanted aerial, ground or nothing")
    table = ImageTable(
        tuple(os.path.abspath(folder / file) for file in columns["path"]),
        tuple(labels["identity"]),
        tuple(labels["camera"]),
        tuple(labels["view"]),
    )
    return table, _ids(columns["id"], path) if "id" in columns else None


def _ids(texts: Sequence[str], path: Path) -> NDArray[np.int64]:
    try:
        return np.array([int(text) for text in texts], dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise DataError(f"table {path}: an id is no 64-bit number: {error}") from None


def _read_csv(path: Path) -> dict[str, list[str]]:
    with csv_rows(path) as (names, rows):
        columns: dict[str, list[str]] = {name: [] for name in names}
        for _, row in rows:
            for name, value in zip(names, row, strict=True):
                columns[name].append(value if name == "path" else value.strip())
    return columns


def _read_parquet(path: Path) -> dict[str, list[str]]:
    arrow = import_extra("pyarrow")
    parquet = import_extra("pyarrow.parquet")
    wanted = ("id", "path", *LABELS)
    try:
        file = parquet.ParquetFile(path)
        names = [name for name in wanted if name in file.schema_arrow.names]
        content = file.read(columns=names).to_pydict()
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"table {path} cannot be read as parquet: {error}") from None
    return {
        name: ["" if value is None else str(value) for value in values]
        for name, values in content.items()
    }
