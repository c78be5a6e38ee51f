"""The reference has every public name of the packages."""

from __future__ import annotations

import re
from importlib import import_module

import pytest
from pages import DOCS

PAGE_OF = {
    "gsalign_kernels": "kernels",
    "gsalign.model": "model",
    "gsalign.data": "data",
    "gsalign.data.synthetic": "synthetic",
    "gsalign.evaluation": "evaluation",
    "gsalign.search": "search",
    "gsalign.export": "export",
    "gsalign.visualize": "visualize",
}


@pytest.mark.parametrize("module", PAGE_OF)
def test_every_public_name_is_in_the_reference(module):
    page = DOCS / "api" / f"{PAGE_OF[module]}.md"
    text = page.read_text(encoding="utf-8")
    if f".. automodule:: {module}\n   :members:\n" in text:
        return  # all of them, whatever they are
    assert f".. currentmodule:: {module}\n" in text
    documented = re.findall(r"^\.\. (?:auto|py:)\w+:: (\w+)(?:\(|$)", text, re.MULTILINE)
    assert sorted(documented) == sorted(import_module(module).__all__)
