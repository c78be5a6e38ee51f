"""The same bits on every run of the same machine, where a configuration asks for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# cuBLAS has one order of sums only with a workspace of a fixed size, which it reads from here when
# it starts.
WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Makes PyTorch use deterministic algorithms inside the block, and refuse where there are none.

    Nothing changes where it is not wanted. The fused operators have one order of sums always; the
    reference warps have none on a GPU, where PyTorch's ``grid_sample`` then raises an error that
    names itself.

    Args:
        wanted: ``training.deterministic``.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault(*WORKSPACE)
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        torch.backends.cudnn.benchmark = benchmark
