"""The specification: every operator in plain PyTorch, differentiable twice, on any device and type."""

from __future__ import annotations
