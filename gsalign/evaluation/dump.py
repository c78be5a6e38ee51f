"""What every query found, as a table for other programs: CSV, JSON lines or Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gsalign.data.records import VIEW_NAMES, ReIDDataset, Split
from gsalign.errors import ConfigError
from gsalign.evaluation.comparison import Comparison
from gsalign.evaluation.metrics import EvaluationResult
from gsalign.evaluation.nearest import nearest
from gsalign.extras import MissingExtraError, import_extra
from gsalign.files import atomic_write

COLUMNS = (
    "protocol",
    "query",
    "identity",
    "camera",
    "view",
    "positives",
    "first_rank",
    "AP",
    "INP",
    "nearest",
    "nearest_identities",
    "nearest_right",
    "nearest_distances",
)
FORMATS = (".csv", ".jsonl", ".parquet")

Row = dict[str, Any]


def query_rows(
    comparison: Comparison, result: EvaluationResult, dataset: ReIDDataset, *, top: int = 10
) -> Iterator[Row]:
    """Yield a row per query of a protocol, in the order of the queries.

    Args:
        comparison: the queries and the gallery.
        result: of the same comparison.
        dataset: the images they are of; ``indices`` of the features are places in its splits.
        top: how many of the nearest gallery images to name.

    Yields:
        ``COLUMNS`` by name. Paths are relative to the root of the set where they are below it.
        ``first_rank``, ``AP`` and ``INP`` are None for a query without positives; shares are in
        0 .. 1. The four lists of the nearest go from the nearest on, without the images that the
        protocol leaves out.
    """
    gallery = [
        (_relative(dataset.gallery, i, dataset.root), dataset.gallery.records[i].identity_name)
        for i in comparison.gallery.indices.tolist()
    ]
    for start, block in comparison.blocks():
        same, left_out = comparison.masks(start, start + len(block))
        distances, places = nearest(block.masked_fill(left_out, float("inf")), top)
        kept = ~left_out.gather(1, places)
        right = same.gather(1, places)
        for row in range(len(block)):
            place = start + row
            found = places[row][kept[row]].tolist()
            index = int(comparison.query.indices[place])
            record = dataset.query.records[index]
            valid = bool(result.num_positives[place])
            yield {
                "protocol": comparison.protocol.name,
                "query": _relative(dataset.query, index, dataset.root),
                "identity": record.identity_name,
                "camera": record.camera_name,
                "view": VIEW_NAMES[record.view],
                "positives": int(result.num_positives[place]),
                "first_rank": int(result.first_rank[place]) if valid else None,
                "AP": float(result.average_precision[place]) if valid else None,
                "INP": float(result.inp[place]) if valid else None,
                "nearest": [gallery[i][0] for i in found],
                "nearest_identities": [gallery[i][1] for i in found],
                "nearest_right": right[row][kept[row]].tolist(),
                "nearest_distances": distances[row][kept[row]].tolist(),
            }


def check_format(path: Path) -> None:
    """Make sure that rows can be written to a file of this name, before work is done for it.

    Raises:
        ConfigError: its suffix is none of ``FORMATS``, or pyarrow is not there for Parquet.
    """
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(
            f"cannot tell the format of {str(path)!r}: its name must end in {', '.join(FORMATS)}"
        )
    if path.suffix.lower() == ".parquet":
        try:
            import_extra("pyarrow.parquet")
        except MissingExtraError as error:
            raise ConfigError(f"{str(path)!r}: {error}; or write .csv or .jsonl") from None


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows to a file, atomically, in the format that its suffix names.

    In CSV the lists are JSON texts.

    Args:
        path: the file.
        rows: of :func:`query_rows`.

    Raises:
        ConfigError: see :func:`check_format`.
    """
    check_format(path)
    kind = path.suffix.lower()
    with atomic_write(path) as temporary:
        if kind == ".parquet":
            _write_parquet(temporary, rows)
            return
        with temporary.open("w", encoding="utf-8", newline="") as file:
            if kind == ".jsonl":
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                return
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows([_cell(row[column]) for column in COLUMNS] for row in rows)


def _write_parquet(path: Path, rows: Sequence[Row]) -> None:
    pyarrow, parquet = import_extra("pyarrow"), import_extra("pyarrow.parquet")
    text, number, share = pyarrow.string(), pyarrow.int64(), pyarrow.float64()
    types = {"positives": number, "first_rank": number, "AP": share, "INP": share}
    types |= {"nearest": pyarrow.list_(text), "nearest_identities": pyarrow.list_(text)}
    types["nearest_right"] = pyarrow.list_(pyarrow.bool_())
    types["nearest_distances"] = pyarrow.list_(share)
    schema = pyarrow.schema([(column, types.get(column, text)) for column in COLUMNS])
    parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema=schema), path)


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value


def _relative(split: Split, index: int, root: Path) -> str:
    path = split.records[index].path
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
