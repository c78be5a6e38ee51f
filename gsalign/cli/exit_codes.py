"""What the command line exits with when it does not exit with 0."""

from __future__ import annotations

USER_FAILURE = 2
"""A failure that is the user's to mend, told on one line of stderr."""

INTERRUPTED = 130
"""Ctrl-C, as shells say it: 128 and the number of SIGINT."""
