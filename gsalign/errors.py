"""Failures a user can mend. The command line prints each as one line and exits with code 2."""

from __future__ import annotations


class GSAlignError(Exception):
    """Base of every failure that is the caller's to mend; its message says how."""


class ConfigError(GSAlignError):
    """A configuration key or value is unknown, of the wrong type, or contradicts another."""


class DataError(GSAlignError):
    """A data folder, table or image is missing, unreadable or not laid out as expected."""


class CheckpointError(GSAlignError):
    """A checkpoint is missing, damaged, of another shape than the network, or cannot be written."""
