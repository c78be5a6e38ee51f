"""Reading one's own images from a table: ``path, identity, camera, view, split``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gsalign.csv_rows import csv_rows
from gsalign.data.labels import number_names, text_of, unknown_camera
from gsalign.data.layout import (
    SPLITS,
    Layout,
    Singletons,
    assemble,
    is_image_name,
    protocols_of,
    some_of,
)
from gsalign.data.records import AERIAL, GROUND, VIEW_NAMES, ImageRecord, ReIDDataset, Split
from gsalign.errors import DataError

COLUMNS = ("path", "identity", "camera", "view", "split")
NOBODY = ("", "-1")
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_VIEWS = {name: view for view, name in VIEW_NAMES.items()} | {"0": GROUND, "1": AERIAL}

TABLE = Layout(
    name="table",
    title="a table of your own",
    folders=(),
    picture="""\
a .csv (commas) or .tsv (tabs) file in UTF-8, whose first line names its columns:
  path      the image; if relative, from the folder of the table
  identity  any text or number; empty or -1: not known
  camera    any text or number; empty or no such column: not known
  view      aerial or ground (or 1, 0); without the column all are ground
  split     train, query or gallery; needed for training and evaluation""",
    example="people/17.jpg",
)


@dataclass(frozen=True)
class TableRow:
    """A row of a table: the image, and the split it says, empty if it says none."""

    record: ImageRecord
    split: str


def is_table(path: Path) -> bool:
    """Whether a path is that of a table, by its suffix."""
    return path.suffix.lower() in _SEPARATORS


def read_table(path: str | os.PathLike[str]) -> tuple[TableRow, ...]:
    """Read a table of images; see ``TABLE.picture`` for its columns.

    Columns may come in any order; others are passed over. Identities and cameras that are texts
    are numbered in the order of the sorted texts, and keep their names in the records. No image is
    opened; that the files exist is checked.

    Args:
        path: a ``.csv`` or ``.tsv`` file.

    Returns:
        The rows in their order.

    Raises:
        DataError: the table is missing, no text in UTF-8, has no rows, lacks a column, or a row is
            wrong; the message names the lines.
    """
    table = Path(path)
    cells = list(_cells(table))
    if not cells:
        raise DataError(f"{table} has no rows. Expected\n{TABLE.picture}")
    people = number_names(row["identity"] for _, row in cells if row["identity"] not in NOBODY)
    cameras = number_names(row["camera"] for _, row in cells if row["camera"] not in NOBODY)
    faults: list[str] = []
    rows: list[TableRow] = []
    seen: dict[tuple[str, str], int] = {}
    for number, (line, row) in enumerate(cells):
        fault = _fault(row, table.parent)
        key = (row["split"], row["path"])
        if not fault and key in seen:
            fault = f"{row['path']} is in line {seen[key]} already"
        if fault:
            faults.append(f"line {line}: {fault}")
            continue
        seen[key] = line
        identity = -1 if row["identity"] in NOBODY else people[row["identity"]]
        camera = unknown_camera(number) if row["camera"] in NOBODY else cameras[row["camera"]]
        record = ImageRecord(
            path=table.parent / row["path"],
            identity=identity,
            camera=camera,
            view=_VIEWS[row["view"].lower() or "ground"],
            identity_text="" if identity < 0 else text_of(row["identity"], identity),
            camera_text="" if camera < 0 else text_of(row["camera"], camera),
        )
        rows.append(TableRow(record, row["split"]))
    if faults:
        # In the order of the lines, and not all of a long table that is wrong throughout.
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise DataError(f"{table}: {'; '.join(faults[:5])}{more}")
    return tuple(rows)


def load_table(
    root: str | os.PathLike[str], *, singletons: Singletons = "drop", max_bad_names: int = 0
) -> ReIDDataset:
    """Read a table that has a column ``split`` as a data set.

    With aerial and ground images in the test the protocols are those by view, else only ``all``.

    Args:
        root: the table.
        singletons: see :func:`gsalign.data.load_cargo`.
        max_bad_names: not used: every row of a table must be right.

    Raises:
        DataError: see :func:`read_table`; or a row has no split, a split no row, or an image to
            train on or to ask with no identity.
    """
    table = Path(root)
    if not is_table(table):
        raise DataError(
            f"data root {str(table)!r} is no .csv or .tsv file. Expected\n{TABLE.picture}"
        )
    records: dict[str, list[ImageRecord]] = {name: [] for name in SPLITS}
    faults: list[str] = []
    for row in read_table(table):
        if not row.split:
            faults.append(f"{row.record.path.name} has no split")
        elif row.split != "gallery" and row.record.identity < 0:
            faults.append(f"{row.record.path.name} of {row.split} has no identity")
        else:
            records[row.split].append(row.record)
    if faults:
        raise DataError(
            f"{table}: {some_of(faults)}. Every row needs a split (train, query, gallery), and "
            "those of train and query an identity"
        )
    splits = {name: Split(name, tuple(found)) for name, found in records.items()}
    dataset = assemble(
        TABLE,
        table,
        splits,
        singletons=singletons,
        protocols=protocols_of(splits["query"], splits["gallery"]),
    )
    return replace(dataset, root=table.parent)


def _cells(table: Path) -> Iterator[tuple[int, Mapping[str, str]]]:
    """Yield the number of the line and the known cells of every row, without outer blanks."""
    if not is_table(table):
        raise DataError(f"{table} is no .csv or .tsv file")
    with csv_rows(table, separator=_SEPARATORS[table.suffix.lower()]) as (names, rows):
        heading = [name.lower() for name in names]
        missing = [name for name in ("path", "identity") if name not in heading]
        if missing:
            raise DataError(
                f"{table} has no column {' and '.join(missing)}; its first line is "
                f"{', '.join(heading) or 'empty'}. Expected\n{TABLE.picture}"
            )
        for line, row in rows:
            known = {
                name: cell.strip()
                for name, cell in zip(heading, row, strict=True)
                if name in COLUMNS
            }
            yield line, dict.fromkeys(COLUMNS, "") | known


def _fault(row: Mapping[str, str], folder: Path) -> str:
    """What is wrong with a row; empty if nothing."""
    if not row["path"]:
        return "no path"
    if not is_image_name(Path(row["path"]).name):
        return f"{row['path']} is no .jpg, .jpeg or .png"
    if row["view"].lower() not in (*_VIEWS, ""):
        return f"view is {row['view']!r}; wanted aerial or ground"
    if row["split"] not in (*SPLITS, ""):
        return f"split is {row['split']!r}; wanted train, query or gallery"
    if not (folder / row["path"]).is_file():
        return f"{row['path']} does not exist"
    return ""
