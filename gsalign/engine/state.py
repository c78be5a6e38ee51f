"""The state of a run on disk, from which it goes on as if it had never stopped.

One safetensors file: tensors by name (``model.*``, ``optimizer.<parameter>.<slot>``, ``random.*``)
and, in its metadata, the numbers as JSON. Nothing in it is pickled, and as it is one file, weights
and counters can never be of two different moments.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gsalign.errors import CheckpointError
from gsalign.model.weights import copy_weights, write_tensors

FORMAT = "gsalign-training-1"


@dataclass
class Progress:
    """The numbers of a run's state.

    Attributes:
        iteration: iterations done.
        evaluated: iterations done when the network was last evaluated; -1: never.
        best: the number that chose the best weights; None before there is one.
        best_iteration: iterations done when they were chosen.
        world_size: number of processes.
        identity: what must not change between parts of one run (seed, batches, optimizer, data).
        scaler: state of the fp16 loss scaler; empty without one.
    """

    iteration: int = 0
    evaluated: int = -1
    best: float | None = None
    best_iteration: int = 0
    world_size: int = 1
    identity: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, float] = field(default_factory=dict)


def save_state(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: Optimizer,
    random: Mapping[str, Tensor],
    progress: Progress,
) -> None:
    """Write the state of a run, atomically.

    Args:
        path: where to; ``.safetensors``.
        model: the network, unwrapped.
        optimizer: whose groups have ``names``, as ``build_optimizer`` makes them.
        random: states of the random generators, uint8 ``[processes, bytes]`` each.
        progress: the numbers.

    Raises:
        CheckpointError: the file cannot be written.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in _named_parameters(optimizer):
        for slot, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{name}.{slot}"] = value
    tensors.update({f"random.{name}": value for name, value in random.items()})
    metadata = {"format": FORMAT, "progress": json.dumps(asdict(progress))}
    write_tensors(path, tensors, metadata)


def load_state(
    path: str | os.PathLike[str], *, model: nn.Module, optimizer: Optimizer
) -> tuple[Progress, dict[str, Tensor]]:
    """Put a run's state back into its network and optimizer.

    Args:
        path: a file of :func:`save_state`.
        model: the network, unwrapped.
        optimizer: over the parameters of this network.

    Returns:
        The numbers, and the states of the random generators.

    Raises:
        CheckpointError: the file is missing, half written, of another kind, or of a network or an
            optimizer of another shape; network and optimizer are then as they were.
    """
    path = Path(path)
    progress, tensors = _read(path)
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "random": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part not in parts:
            raise CheckpointError(f"{path} holds {name!r}, which is no part of a run's state")
        parts[part][rest] = tensor
    state = _optimizer_state(parts["optimizer"], optimizer, path)
    try:
        copy_weights(model, parts["model"])
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    optimizer.state.clear()
    for group in optimizer.param_groups:
        # Averages lie with their parameter; counters too where the step never leaves the device.
        counts_there = group.get("fused") or group.get("capturable")
        for parameter in group["params"]:
            if parameter in state:
                optimizer.state[parameter] = {
                    slot: value.to(parameter.device) if value.ndim or counts_there else value
                    for slot, value in state[parameter].items()
                }
    return progress, parts["random"]


def _read(path: Path) -> tuple[Progress, dict[str, Tensor]]:
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: leave --resume out to start a new run")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise CheckpointError(
                f"{path} is not the state of a run (format {metadata.get('format')!r}, wanted "
                f"{FORMAT!r}); weights alone cannot be resumed from"
            )
        numbers = json.loads(metadata["progress"])
        known = {item.name for item in fields(Progress)}
        return Progress(**{k: numbers[k] for k in known}), safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged or half written: {error}") from error


def _named_parameters(optimizer: Optimizer) -> list[tuple[str, nn.Parameter]]:
    return [
        (name, parameter)
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    ]


def _optimizer_state(
    tensors: Mapping[str, Tensor], optimizer: Optimizer, path: Path
) -> dict[nn.Parameter, dict[str, Tensor]]:
    parameters = dict(_named_parameters(optimizer))
    state: dict[nn.Parameter, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        name, _, slot = full.rpartition(".")
        parameter = parameters.get(name)
        if parameter is None or (tensor.ndim and tensor.shape != parameter.shape):
            found = "no such parameter" if parameter is None else f"{list(parameter.shape)}"
            raise CheckpointError(
                f"{path} does not fit the optimizer: {full} is {list(tensor.shape)}, the network "
                f"has {found}"
            )
        state.setdefault(parameter, {})[slot] = tensor
    return state


def random_state(device: torch.device) -> dict[str, Tensor]:
    """States of this process's random generators, uint8 ``[bytes]`` each, on the CPU."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: Mapping[str, Tensor], rank: int, device: torch.device) -> None:
    """Put one process's random generators back, from the rows all of them saved."""
    # Cloned, because PyTorch reads a state from the start of its storage, offset or not.
    torch.set_rng_state(states["cpu"][rank].clone())
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"][rank].clone(), device)
