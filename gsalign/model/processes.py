"""Images of all processes side by side, so that losses compare them as one process would."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# The older of its two names goes out of use with PyTorch 2.14.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(
    dist, "all_gather_into_tensor", None
)


def process_count() -> int:
    """Processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _RowsOfAll(torch.autograd.Function):
    """All-gather along the first dimension whose backward pass sends nothing."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.processes, ctx.rank = dist.get_world_size(), dist.get_rank()
        gathered = rows.new_empty(ctx.processes * rows.shape[0], *rows.shape[1:])
        _all_gather(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # Every process makes the same loss of the same rows, so the gradient of its own is here.
        # DistributedDataParallel will divide the sum over processes by their number, which is right
        # for what comes after the gathering, and is undone here for what came before.
        return grad.chunk(ctx.processes)[ctx.rank] * ctx.processes


def rows_of_all(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Rows of all processes, those of process 0 first, in one exchange.

    For a loss that every process computes of the same gathered rows, under
    DistributedDataParallel: its averaged gradients are then those of this one loss.

    Args:
        tensors: ``[B, ...]`` each, of one type and device; the same shapes on every process.

    Returns:
        ``[processes * B, ...]`` each, on every process.
    """
    flat = [tensor.flatten(1) if tensor.dim() > 1 else tensor.unsqueeze(1) for tensor in tensors]
    gathered = _RowsOfAll.apply(torch.cat(flat, dim=1))
    parts = gathered.split([part.shape[1] for part in flat], dim=1)
    return [
        part.reshape(-1, *tensor.shape[1:]) for part, tensor in zip(parts, tensors, strict=True)
    ]
