"""The one error type of the operators that is not a plain ValueError or TypeError."""

from __future__ import annotations


class KernelUnavailableError(RuntimeError):
    """A named implementation cannot serve a call; the message says why and what can."""
