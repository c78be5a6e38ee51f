"""Tables for people."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.table import Table


def plain_table(title: str, texts: Iterable[str], figures: Iterable[str]) -> Table:
    """An empty table, plain and narrow enough for the 80 columns of a log file.

    Args:
        title: above it; empty: none.
        texts: headings of the first columns, whose cells stand to the left.
        figures: headings of the others, to the right.
    """
    table = Table(title=title or None, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for heading in texts:
        table.add_column(heading, no_wrap=True)
    for heading in figures:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
