"""References to what exists but has no place on the site are shown as code, without a warning.

Docstrings are read in the source too, where a reference to an internal function is of use. What is
still warned of, and stops the build, is a reference to a name that is nowhere in our packages.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import walk_packages
from types import ModuleType
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.typing import ExtensionMetadata

PACKAGES = ("gsalign", "gsalign_kernels")


@cache
def modules() -> dict[str, ModuleType]:
    """All modules of our packages by name, but those that are programs."""
    found = {name: import_module(name) for name in PACKAGES}
    for package in PACKAGES:
        for module in walk_packages(found[package].__path__, f"{package}."):
            if not module.name.endswith(("__main__", "_bindings", "_cpu", "_cuda")):
                found[module.name] = import_module(module.name)
    return found


def exists(target: str) -> bool:
    """Whether a name, from the root of a package or from inside a module, leads to something."""
    if target in modules():
        return True
    path, _, name = target.rpartition(".")
    if path in modules():
        return hasattr(modules()[path], name)
    return any(_has(module, target) for module in modules().values())


def _has(value: Any, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(value, name):
            return False
        value = getattr(value, name)
    return True


def as_code(
    _app: Sphinx, _environment: BuildEnvironment, reference: pending_xref, shown: nodes.Element
) -> nodes.Element | None:
    """What to show for a reference that Sphinx found nothing for; None: a warning."""
    ours = reference.get("refdomain") == "py" and exists(reference["reftarget"])
    return shown if ours else None


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the handler."""
    app.connect("missing-reference", as_code)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
