"""Loads the compiled operator libraries, or keeps the reason why one cannot be loaded."""

from __future__ import annotations

import json
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
_BUILD_REPORT = _FOLDER / "_build_report.json"


def build_report() -> dict[str, object]:
    """What the build of this installation compiled, for which targets, and what not and why.

    Returns:
        The report written by ``setup.py``, per module (``cpu``, ``cuda``, ``bindings``) whether it
        was ``built``, a ``reason`` when not, compiler and targets. Empty in a source tree that was
        never built.
    """
    try:
        report = json.loads(_BUILD_REPORT.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def _why_not_built(module: str) -> str:
    entry = build_report().get(module)
    if isinstance(entry, dict) and entry.get("reason"):
        return f"was not built: {entry['reason']}"
    return "was not built; reinstall with `pip install -v .` and read its last lines"


def _load(module: str) -> str | None:
    """Load one operator library; return why it could not be, or None."""
    candidates = sorted(_FOLDER.glob(f"_{module}.*so"))
    if not candidates:
        return f"the {module} library {_why_not_built(module)}"
    try:
        torch.ops.load_library(str(candidates[0]))
    except (OSError, RuntimeError) as error:
        return f"the {module} library does not load: {str(error).splitlines()[0]}"
    return None


# The schemas of both libraries live in the CPU one, so without it the CUDA one cannot be loaded.
cpu_reason: str | None = _load("cpu")
cuda_reason: str | None = _load("cuda") if cpu_reason is None else cpu_reason
