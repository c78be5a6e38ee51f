"""Training: optimizer, schedule, the loop, checkpoints and what is logged."""

from __future__ import annotations
