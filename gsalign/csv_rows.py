"""Rows of CSV files with a heading, as spreadsheets write them."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gsalign.errors import DataError

Rows = Iterator[tuple[int, list[str]]]


@contextmanager
def csv_rows(path: Path, *, separator: str = ",") -> Iterator[tuple[list[str], Rows]]:
    """Open a table; what is wrong with the file raises inside the block too.

    Args:
        path: a file in UTF-8, with or without a byte order mark.
        separator: between cells.

    Yields:
        The heading without outer blanks, empty for an empty file; and the rows, each with the
        number of its line and as many cells as the heading. Lines without any text are passed
        over.

    Raises:
        DataError: the file is missing, no text in UTF-8, names a column twice (large and small
            letters are the same), or a row has more or fewer cells than the heading; the message
            names the line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=separator, strict=True)
            heading = [name.strip() for name in next(reader, [])]
            named = [name.lower() for name in heading if name]
            if len(set(named)) < len(named):
                raise DataError(f"table {path} names a column twice: {', '.join(heading)}")

            def rows() -> Rows:
                for row in reader:
                    if not any(row):
                        continue
                    if len(row) != len(heading):
                        raise DataError(
                            f"table {path}, line {reader.line_num}: {len(row)} cells, the first "
                            f"line has {len(heading)}; put a cell that holds the separator in "
                            "double quotes"
                        )
                    yield reader.line_num, row

            yield heading, rows()
    except FileNotFoundError:
        raise DataError(f"table {path} does not exist") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"table {path} cannot be read as text in UTF-8: {error}") from None
