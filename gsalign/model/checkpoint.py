"""Our own weights on disk: safetensors, with the configuration in the file's metadata."""

from __future__ import annotations

import os
from pathlib import Path

import safetensors
from pydantic import ValidationError

from gsalign.errors import CheckpointError
from gsalign.model.config import ModelConfig
from gsalign.model.network import GSAlign, without_values
from gsalign.model.weights import copy_weights, read_state_dict, write_tensors

FORMAT = "gsalign-weights-1"
_FORMAT_KEY = "format"
_CONFIG_KEY = "config"


def save_weights(model: GSAlign, path: str | os.PathLike[str]) -> None:
    """Write weights, statistics and configuration of a network to one file, atomically.

    Args:
        model: the network (not a wrapper around it).
        path: where to; ``.safetensors`` by convention.

    Raises:
        CheckpointError: the file cannot be written.
    """
    metadata = {_FORMAT_KEY: FORMAT, _CONFIG_KEY: model.config.model_dump_json()}
    write_tensors(path, model.state_dict(), metadata)


def holds_our_weights(path: str | os.PathLike[str]) -> bool:
    """Whether there is a file of :func:`save_weights` at ``path``, by its metadata alone."""
    if not Path(path).is_file():
        return False
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(_FORMAT_KEY) == FORMAT
    except (safetensors.SafetensorError, OSError):
        return False


def read_weights_config(path: str | os.PathLike[str]) -> ModelConfig:
    """The configuration stored in a file of :func:`save_weights`; the tensors stay unread.

    Raises:
        CheckpointError: the file is missing, damaged, or not one of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"cannot read {path} as safetensors: {error}") from error
    if metadata.get(_FORMAT_KEY) != FORMAT or _CONFIG_KEY not in metadata:
        raise CheckpointError(
            f"{path} carries no configuration ({_FORMAT_KEY} {metadata.get(_FORMAT_KEY)!r}, wanted "
            f"{FORMAT!r}): build the network yourself and use load_weights, or load_published for "
            "a checkpoint of the published code"
        )
    try:
        return ModelConfig.model_validate_json(metadata[_CONFIG_KEY])
    except ValidationError as error:
        raise CheckpointError(f"{path} carries a configuration we do not know: {error}") from error


def load_model(path: str | os.PathLike[str]) -> GSAlign:
    """Build the network a file of :func:`save_weights` describes, with its weights.

    Returns:
        The network on the CPU, in evaluation mode.

    Raises:
        CheckpointError: the file is missing, damaged, not one of ours, or contradicts itself.
    """
    model = without_values(read_weights_config(path))
    load_weights(model, path)
    return model.eval()


def load_weights(model: GSAlign, path: str | os.PathLike[str]) -> None:
    """Load a complete state dict of ours into a network of the same shape; all or nothing.

    Args:
        model: the network; keeps its device, type and mode.
        path: a file of :func:`save_weights`, or a ``.pth`` with the same names.

    Raises:
        CheckpointError: the file is missing or damaged, or names or shapes differ from the
            network's; the first differing tensors are named with both shapes.
    """
    copy_weights(model, read_state_dict(path))
