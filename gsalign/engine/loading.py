"""Loading weights for use: our own files, or a checkpoint of the published code."""

from __future__ import annotations

from pathlib import Path

from gsalign.errors import CheckpointError
from gsalign.model import GSAlign, ModelConfig, load_model, load_published

# What two configurations of the same function have in common.
_SHAPING = ("image_size", "patch_size", "width", "depth", "num_heads", "mlp_ratio", "num_views")
_LTPS_FORMS = ("angle", "aspect_true", "points_per_image")


def load_network(checkpoint: Path, config: ModelConfig, *, compare: bool = True) -> GSAlign:
    """The network of a checkpoint, in evaluation mode on the CPU.

    Args:
        checkpoint: a ``.safetensors`` of ours, which tells its network itself; or a ``.pth`` of
            the published code, for which ``config`` gives image size, heads and eta.
        config: the network one expects.
        compare: make sure that it is this one.

    Raises:
        CheckpointError: the file is missing or damaged, or holds another network.
    """
    if checkpoint.suffix == ".safetensors":
        network = load_model(checkpoint)
    else:
        network = load_published(
            checkpoint,
            image_size=config.image_size,
            num_heads=config.num_heads,
            eta=config.ltps.eta,
        )
    if compare:
        _compare(checkpoint, network.config, config)
    return network


def _compare(checkpoint: Path, found: ModelConfig, wanted: ModelConfig) -> None:
    differing = [
        f"{name} {getattr(found, name)} instead of {getattr(wanted, name)}"
        for name in _SHAPING
        if getattr(found, name) != getattr(wanted, name)
    ]
    if found.ltps_layers != wanted.ltps_layers:
        differing.append(
            f"ltps.layers {list(found.ltps_layers)} instead of {list(wanted.ltps_layers)}"
        )
    elif found.ltps_layers:
        differing += [
            f"ltps.{name} {getattr(found.ltps, name)} instead of {getattr(wanted.ltps, name)}"
            for name in ("control_points", "eta", "hidden", *_LTPS_FORMS)
            if getattr(found.ltps, name) != getattr(wanted.ltps, name)
        ]
    if differing:
        raise CheckpointError(
            f"{checkpoint} holds another network than the configuration describes: "
            f"{', '.join(differing)}"
        )
