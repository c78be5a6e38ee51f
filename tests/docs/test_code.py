"""Code on the pages: what can run runs, with the shapes its comments tell; the rest imports."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from pages import DOCS, PAGES, ROOT, fences, name_of

OURS = ("gsalign", "gsalign_kernels")
# The others want files, networks or data of the reader's own.
COMPLETE = [ROOT / "README.md", DOCS / "kernels.md"]
SHAPE = re.compile(r"# (\[[\d, ]+\])$")


def blocks(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return [fence.text for fence in fences(text) if fence.language == "python"]


def told_shapes(block: str) -> dict[str, list[int]]:
    """By the name that a statement assigns to, the shape in the comment behind the statement."""
    lines = block.splitlines()
    found = {}
    for statement in ast.parse(block).body:
        comment = SHAPE.search(lines[(statement.end_lineno or 1) - 1])
        if comment and isinstance(statement, ast.Assign):
            found[ast.unparse(statement.targets[0])] = ast.literal_eval(comment[1])
    return found


@pytest.mark.parametrize("page", COMPLETE, ids=name_of)
def test_code_runs_and_has_the_shapes_it_tells(page):
    torch.manual_seed(0)
    names: dict[str, object] = {}
    ran = blocks(page)
    assert ran
    for block in ran:
        exec(compile(block, str(page), "exec"), names)
        for name, shape in told_shapes(block).items():
            assert list(names[name].shape) == shape, name


def test_shapes_are_read_from_comments():
    block = "a = f(\n    1,\n)  # [2, 3]\nb = 1  # (x, y) in [-1, 1]\nc = 2  # [4]\n"
    assert told_shapes(block) == {"a": [2, 3], "c": [4]}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name_of)
def test_what_code_imports_of_ours_exists(page):
    for block in blocks(page):
        imports = [
            statement
            for statement in ast.walk(ast.parse(block))
            if (isinstance(statement, ast.ImportFrom) and str(statement.module).startswith(OURS))
            or (
                isinstance(statement, ast.Import)
                and all(alias.name.startswith(OURS) for alias in statement.names)
            )
        ]
        for statement in imports:
            exec(ast.unparse(statement), {})
