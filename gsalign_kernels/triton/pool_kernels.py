"""Triton kernels of the masked part pooling."""

from __future__ import annotations

from gsalign_kernels.triton.pool_backward_kernels import backward_kernel, finish_kernel
from gsalign_kernels.triton.pool_forward_kernels import forward_kernel

__all__ = ["backward_kernel", "finish_kernel", "forward_kernel"]
