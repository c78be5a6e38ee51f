"""State dicts: to files, from files and into a network, with errors that name tensors."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from gsalign.errors import CheckpointError
from gsalign.files import atomic_write

_WRAPPERS = ("model", "state_dict")
_SHOWN = 6


def name_some(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _read_file(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"cannot read {path}: {reason}; wanted a file of tensors only, .safetensors or one "
            "that torch.load reads with weights_only=True"
        ) from error
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def read_state_dict(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Tensor]:
    """A flat state dict from a file or a mapping.

    Tensors nested under ``"model"`` or ``"state_dict"`` are found, and the prefix ``"module."``
    that a data-parallel wrapper puts before every name is removed. NumPy arrays are accepted.

    Args:
        source: path of a ``.safetensors`` file or of one ``torch.load`` reads with
            ``weights_only=True``; or a mapping.

    Returns:
        Name -> tensor, on the CPU when read from a file.

    Raises:
        CheckpointError: the file is missing or damaged, or holds something else than tensors.
    """
    content = source if isinstance(source, Mapping) else _read_file(Path(source))
    where = "the mapping" if isinstance(source, Mapping) else str(source)
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{where} holds no state dict, but {type(content).__name__}")
    state = {}
    for name, value in content.items():
        if not isinstance(value, Tensor):
            try:
                value = torch.as_tensor(value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise CheckpointError(
                    f"{where} holds {type(value).__name__} under {name!r}, wanted tensors only"
                ) from error
        state[str(name)] = value
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors, wherever they are, to one safetensors file, atomically.

    Args:
        path: where to.
        tensors: by name.
        metadata: of the file.

    Raises:
        CheckpointError: the file cannot be written, as on a full disk; what was there stays.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with atomic_write(path) as temporary:
            safetensors.torch.save_file(plain, temporary, metadata=dict(metadata))
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{os.fspath(path)} cannot be written: {error}") from error


def copy_weights(
    model: nn.Module, state: Mapping[str, Tensor], *, names: Mapping[str, str] | None = None
) -> None:
    """Copy a complete state dict into a network, or change nothing.

    Args:
        model: the network.
        state: a tensor for every name of ``model.state_dict()``, and no other.
        names: name in the file -> name in the network, for messages in the file's own words.

    Raises:
        CheckpointError: names are missing or unknown, or shapes differ; the first few are named
            with both shapes.
    """
    wanted = model.state_dict()
    shown = {} if names is None else {ours: theirs for theirs, ours in names.items()}
    problems = []
    missing = [shown.get(name, name) for name in wanted if name not in state]
    unknown = [shown.get(name, name) for name in state if name not in wanted]
    if missing:
        problems.append(f"missing {name_some(missing)}")
    if unknown:
        problems.append(f"unknown {name_some(unknown)}")
    differing = [
        f"{shown.get(name, name)} is {list(state[name].shape)}, the network has "
        f"{list(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    if differing:
        problems.append(name_some(differing))
    if problems:
        raise CheckpointError(f"the checkpoint does not fit the network: {'; '.join(problems)}")
    model.load_state_dict(dict(state))
