"""Links and pictures of all pages lead to something, and every page is in the site's contents."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from pages import DOCS, PAGES, ROOT, anchors, fences, links, name_of

EXTERNAL = ("http://", "https://", "mailto:")


def fault(page: Path, target: str, here: str) -> str | None:
    """What is wrong with a link of a page whose text is ``here``; None when nothing is."""
    if target.startswith(EXTERNAL):
        return None
    path, _, heading = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    if not file.is_relative_to(ROOT):
        return f"{target} leaves the repository"
    if not file.is_file():
        return f"{target} is no file; a link wants one from the folder of its page"
    text = here if file == page else file.read_text(encoding="utf-8") if heading else ""
    if heading and heading not in anchors(text):
        return f"{target}: no such heading; there are {sorted(anchors(text))}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_something(page):
    text = page.read_text(encoding="utf-8")
    assert not [wrong for target in links(text) if (wrong := fault(page, target, text))]


def test_wrong_links_are_found():
    page = DOCS / "data.md"
    text = "# Data sets\n\n## Of `one`, and two\n\n## Of `one`, and two\n"
    assert fault(page, "data.md#of-one-and-two-1", text) is None
    assert fault(page, "../README.md", text) is None
    assert fault(page, "#of-one-and-two-2", text)
    assert fault(page, "README.md", text)
    assert fault(page, "../../elsewhere.md", text)
    assert links("a [b](c.md#d), ![e](f.png) and `[g](h)`") == ["c.md#d", "f.png"]


def test_every_page_is_in_the_contents():
    pages = {page.relative_to(DOCS).with_suffix("").as_posix() for page in DOCS.rglob("*.md")}
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    entries = [
        line
        for fence in fences(index)
        if fence.language == "{toctree}"
        for line in fence.text.split()
        if not line.startswith(":")
    ]
    assert entries
    missing = {
        page for page in pages - {"index"} if not any(fnmatchcase(page, entry) for entry in entries)
    }
    assert not missing, f"not in a toctree of docs/index.md: {sorted(missing)}"
