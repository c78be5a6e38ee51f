"""The pictures of runs: what is in their folders, put into the hands of ``gsalign.visualize``."""

from __future__ import annotations
