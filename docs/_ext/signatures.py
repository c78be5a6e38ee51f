"""Signatures of the reference as one reads them, where autodoc would show how they are made."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata


def readable(
    _app: Sphinx,
    what: str,
    _name: str,
    documented: Any,
    _options: Any,
    arguments: str | None,
    result: str | None,
) -> tuple[str | None, str | None]:
    """The arguments and result to show; handler of ``autodoc-process-signature``."""
    if what == "class" and issubclass(documented, BaseModel):
        fields = documented.model_fields.items()
        return f"(*, {', '.join(_setting(name, field) for name, field in fields)})", None
    return _named(arguments), _named(result)


def _setting(name: str, field: FieldInfo) -> str:
    """A setting and its default, without the bounds in its type that pydantic checks."""
    if field.is_required():
        return name
    default = field.get_default(call_default_factory=True)
    section = isinstance(default, BaseModel)
    return f"{name}={type(default).__name__}()" if section else f"{name}={default!r}"


def _named(text: str | None) -> str | None:
    """Names of ``autodoc_type_aliases`` without the wrapper that Sphinx leaves around some."""
    return text and re.sub(r"TypeAliasForwardRef\('([^']*)'\)", r"\1", text)


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the handler."""
    app.connect("autodoc-process-signature", readable)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
