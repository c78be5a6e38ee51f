"""What aligns images: the way that a configuration names; keeping it, and taking another run's."""

from __future__ import annotations

import os

from gsalign.errors import CheckpointError
from gsalign.model.config import ModelConfig
from gsalign.model.orientation import Uprighting
from gsalign.model.orientation_parts import UprightingByParts
from gsalign.model.orientation_rays import UprightingByRays
from gsalign.model.weights import read_state_dict, write_tensors

_PREFIX = "uprighting."


def create_uprighting(config: ModelConfig) -> Uprighting:
    """What predicts how images are to be aligned, and aligns them, freshly drawn."""
    if config.orientation.reads == "parts":
        return UprightingByParts(config.image_size, config.orientation, config.label_groups)
    return UprightingByRays(config.image_size, config.orientation)


def save_uprighting(uprighting: Uprighting, path: str | os.PathLike[str]) -> None:
    """Write the predictor as :func:`take_uprighting` reads it, all or nothing."""
    state = uprighting.state_dict()
    write_tensors(path, {_PREFIX + name: tensor for name, tensor in state.items()}, {})


def take_uprighting(uprighting: Uprighting, path: str | os.PathLike[str]) -> None:
    """Take the predictor from a network of ours; all or nothing.

    Args:
        uprighting: of the new network; in place.
        path: file of :func:`save_uprighting`, or of :func:`gsalign.model.save_weights` of a
            network that aligns images likewise.

    Raises:
        CheckpointError: the file is missing or damaged, or its network turns no images, or turns
            them in another way.
    """
    try:
        state = read_state_dict(path)
    except CheckpointError as error:
        raise CheckpointError(f"model.orientation.pretrained: {error}") from error
    found = {
        name.removeprefix(_PREFIX): tensor
        for name, tensor in state.items()
        if name.startswith(_PREFIX)
    }
    wanted = {name: tensor.shape for name, tensor in uprighting.state_dict().items()}
    if {name: tensor.shape for name, tensor in found.items()} != wanted:
        how = "turns images in another way" if found else "turns no images"
        raise CheckpointError(
            f"model.orientation.pretrained {os.fspath(path)}: its network {how}; wanted that of a "
            "run with the same model.orientation.enabled, reads and sizes"
        )
    uprighting.load_state_dict(found)
