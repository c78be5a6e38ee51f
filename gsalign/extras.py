"""Packages that only some of the library needs, and what to say where they are missing."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from gsalign.errors import GSAlignError


class MissingExtraError(GSAlignError):
    """A package that this needs is not installed; the message says how to get it."""


def import_extra(module: str, *, extra: str = "search") -> Any:
    """A module of an optional package.

    Args:
        module: name of the module, as ``"faiss"``.
        extra: the optional dependencies of this distribution that bring it.

    Raises:
        MissingExtraError: it is not installed, or does not load.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"this needs {module}, which does not load ({error}): pip install 'gsalign[{extra}]'"
        ) from None
