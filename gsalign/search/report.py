"""Answers of a search as a table for people, and as JSON and CSV for programs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from rich import box
from rich.table import Table
from rich.text import Text

from gsalign.search.answers import Hit
from gsalign.search.table import ImageTable

ReportFormat = Literal["table", "json", "csv"]

_COLUMNS = ("query", "rank", "distance", "id", "path", "identity", "camera", "view")


@dataclass(frozen=True)
class Answer:
    """One query with what was found.

    Attributes:
        path: the image that asked.
        identity: its label, or empty.
        camera: its label, or empty.
        view: its label, or empty.
        hits: the nearest first.
    """

    path: str
    identity: str
    camera: str
    view: str
    hits: tuple[Hit, ...]


def make_answers(queries: ImageTable, found: Sequence[tuple[Hit, ...]]) -> list[Answer]:
    """Put queries and their hits together.

    Args:
        queries: the images that asked.
        found: their hits, in the same order.
    """
    rows = zip(
        queries.paths, queries.identities, queries.cameras, queries.views, found, strict=True
    )
    return [Answer(*row) for row in rows]


def as_tables(answers: Sequence[Answer]) -> list[Table]:
    """A table for every answer."""
    tables = []
    for answer in answers:
        told = ", ".join(text for text in (answer.identity, answer.camera, answer.view) if text)
        table = Table(
            title=Text(f"{answer.path} ({told})" if told else answer.path),
            title_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        for name in ("rank", "distance", "id"):
            table.add_column(name, justify="right", no_wrap=True)
        for name in ("identity", "camera", "view"):
            table.add_column(name, no_wrap=True)
        table.add_column("path", no_wrap=True)
        for rank, hit in enumerate(answer.hits, 1):
            table.add_row(
                str(rank),
                f"{hit.distance:.4f}",
                str(hit.id),
                *(Text(text) for text in (hit.identity, hit.camera, hit.view, hit.path)),
            )
        tables.append(table)
    return tables


def as_json(answers: Sequence[Answer]) -> str:
    """A list with an object for every answer: ``query`` and ``hits``."""
    document = []
    for answer in answers:
        query = {name: getattr(answer, name) for name in ("path", "identity", "camera", "view")}
        hits = [{"rank": rank, **asdict(hit)} for rank, hit in enumerate(answer.hits, 1)]
        document.append({"query": query, "hits": hits})
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def as_csv(answers: Sequence[Answer]) -> str:
    """A row for every hit: query, rank, distance, id, path, identity, camera, view."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for answer in answers:
        for rank, hit in enumerate(answer.hits, 1):
            labels = (hit.path, hit.identity, hit.camera, hit.view)
            writer.writerow([answer.path, rank, f"{hit.distance:.6f}", hit.id, *labels])
    return text.getvalue()
