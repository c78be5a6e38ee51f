"""The command line: ``gsalign <command>``, exit codes and one-line errors."""

from __future__ import annotations

from gsalign.cli.main import main

__all__ = ["main"]
