"""Fused operators for GSAlign: splines, warps, convolved means, pooling, prototypes, distances.

Every operator has the same meaning in several implementations (plain PyTorch, C++ for the CPU,
CUDA C++, Triton); :func:`use_kernels` chooses, :func:`kernel_report` tells what can run.
"""

from __future__ import annotations

from gsalign_kernels.backends import KernelReport, kernel_report, use_kernels
from gsalign_kernels.conv import conv_relu_mean
from gsalign_kernels.distance import part_distance, part_search
from gsalign_kernels.errors import KernelUnavailableError
from gsalign_kernels.pool import masked_part_pool, stripe_masks
from gsalign_kernels.prototype import masked_prototype_loss
from gsalign_kernels.tps import (
    TpsSolution,
    tps_basis,
    tps_evaluate,
    tps_grid,
    tps_solve,
    tps_solve_ex,
)
from gsalign_kernels.warp import warp_image, warp_tokens

__all__ = [
    "KernelReport",
    "KernelUnavailableError",
    "TpsSolution",
    "conv_relu_mean",
    "kernel_report",
    "masked_part_pool",
    "masked_prototype_loss",
    "part_distance",
    "part_search",
    "stripe_masks",
    "tps_basis",
    "tps_evaluate",
    "tps_grid",
    "tps_solve",
    "tps_solve_ex",
    "use_kernels",
    "warp_image",
    "warp_tokens",
]
