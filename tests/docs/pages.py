"""What the tests of the pages need to know of Markdown."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])

_MARKDOWN = MarkdownIt("commonmark").enable("table")


class Fence(NamedTuple):
    language: str
    text: str
    line: int


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def tokens(text: str) -> list[Token]:
    """All tokens, those inside of lines too."""
    return [inner for token in _MARKDOWN.parse(text) for inner in (token, *(token.children or ()))]


def links(text: str) -> list[str]:
    """Where links and pictures lead."""
    found = [token.attrs.get("href") or token.attrs.get("src") for token in tokens(text)]
    return [str(target) for target in found if target]


def anchors(text: str) -> set[str]:
    """The names that code hosts give to headings, and MyST after them."""
    parsed = _MARKDOWN.parse(text)
    seen: Counter[str] = Counter()
    found = set()
    for opening, line in pairwise(parsed):
        if opening.type != "heading_open":
            continue
        title = "".join(token.content for token in line.children or ())
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def fences(text: str) -> list[Fence]:
    """Blocks of code and directives of MyST."""
    return [
        Fence(token.info.strip(), token.content, token.map[0] + 1 if token.map else 0)
        for token in _MARKDOWN.parse(text)
        if token.type == "fence"
    ]
