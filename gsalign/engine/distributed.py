"""Devices and processes: the accelerator of a run, and gathering rows over its processes."""

from __future__ import annotations

import os
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast
from torch import Tensor, nn

from gsalign.errors import ConfigError


def on_cpu(device: Literal["auto", "cpu", "cuda"]) -> bool:
    """Whether that choice of a device means the CPU here."""
    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())


def build_accelerator(
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    precision: Literal["no", "fp16", "bf16"] = "no",
    find_unused_parameters: bool = False,
    remember_casts: bool = True,
) -> Accelerator:
    """An accelerator for this process, alone or one of several under torchrun or accelerate.

    Args:
        device: ``"auto"`` takes a GPU if PyTorch sees one.
        precision: of autocast.
        find_unused_parameters: of DistributedDataParallel.
        remember_casts: whether autocast keeps weights that it has cast until the forward pass ends;
            a CUDA graph must make its own.

    Raises:
        ConfigError: there is no GPU where one is asked for, or it cannot compute in ``precision``.
    """
    cpu = on_cpu(device)
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device is cuda, but PyTorch sees no GPU: install a CUDA build of PyTorch and a "
            "driver, or set device=cpu"
        )
    if cpu and precision == "fp16":
        raise ConfigError(
            "training.precision fp16 needs a GPU, and this run is on the CPU: set "
            "training.precision=no (or bf16)"
        )
    if not cpu and precision == "bf16" and not torch.cuda.is_bf16_supported():
        raise ConfigError(
            f"training.precision bf16 is not supported by {torch.cuda.get_device_name()}: set "
            "training.precision=fp16"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        # Accelerate keeps the first accelerator's choices for the whole process; a second run in
        # the same one may choose otherwise.
        AcceleratorState._reset_state(reset_partial_state=True)
    handlers: list[Any] = []
    if find_unused_parameters:
        from accelerate import DistributedDataParallelKwargs

        handlers.append(DistributedDataParallelKwargs(find_unused_parameters=True))
    if not remember_casts:
        from accelerate import AutocastKwargs

        handlers.append(AutocastKwargs(cache_enabled=False))
    return Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=handlers)


def gather_rows(accelerator: Accelerator, rows: Tensor) -> Tensor:
    """Rows of all processes, those of process 0 first; each may bring another number of them.

    Args:
        accelerator: of the run.
        rows: ``[N, ...]``, equal beyond the first dimension.

    Returns:
        ``[sum of N, ...]`` on every process, on the device of ``rows``.
    """
    if accelerator.num_processes == 1:
        return rows
    device = rows.device
    # Accelerate wants equal shapes, on its device; the filler is cut off again, so that nothing
    # is counted twice.
    counts = accelerator.gather(torch.tensor([len(rows)], device=accelerator.device)).tolist()
    padded = rows.new_zeros((max(counts), *rows.shape[1:]), device=accelerator.device)
    padded[: len(rows)] = rows
    stacked = accelerator.gather(padded.unsqueeze(0))
    return torch.cat([stacked[i, :count] for i, count in enumerate(counts)]).to(device)


def share_buffers(accelerator: Accelerator, network: nn.Module) -> None:
    """Give all processes the buffers of process 0, which are those a checkpoint keeps.

    Each process moves the running statistics of the necks by its own part of a batch;
    DistributedDataParallel evens them out only when the next iteration starts.

    Args:
        accelerator: of the run.
        network: unwrapped; its persistent buffers are written to.
    """
    if accelerator.num_processes == 1:
        return
    parameters = {name for name, _ in network.named_parameters()}
    for name, tensor in network.state_dict().items():
        if name not in parameters:
            tensor.copy_(broadcast(tensor, from_process=0))
