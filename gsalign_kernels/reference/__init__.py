"""The specification: every operator in plain PyTorch, on any device and type.

Differentiable twice; the two warps only where PyTorch's own ``grid_sample`` is (2.15 is, 2.11 is
not).
"""

from __future__ import annotations
