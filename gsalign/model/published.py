"""Checkpoints of the published code: every key read, checked against ours, or known to be dead."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import gsalign_kernels
from gsalign.errors import CheckpointError
from gsalign.model.config import DamConfig, LtpsConfig, ModelConfig
from gsalign.model.ltps import PREFIX, control_grid
from gsalign.model.network import GSAlign, without_values
from gsalign.model.weights import copy_weights, name_some, read_state_dict

_FIXED = {
    "backbone.cls_token": "backbone.class_token",
    "backbone.view_token": "backbone.view_token",
    "backbone.pos_embed": "backbone.position",
    "backbone.patch_embed.proj.weight": "backbone.patch_embed.proj.weight",
    "backbone.patch_embed.proj.bias": "backbone.patch_embed.proj.bias",
    "backbone.norm.weight": "backbone.norm.weight",
    "backbone.norm.bias": "backbone.norm.bias",
}
_BLOCK = (
    "norm1.weight norm1.bias attn.qkv.weight attn.qkv.bias attn.proj.weight attn.proj.bias "
    "norm2.weight norm2.bias mlp.fc1.weight mlp.fc1.bias mlp.fc2.weight mlp.fc2.bias"
).split()
_LTPS = {
    "src_points": "source_points",
    "angle_predictor.0.weight": "predictor.conv.weight",
    "angle_predictor.0.bias": "predictor.conv.bias",
    "angle_predictor.4.weight": "predictor.hidden.weight",
    "angle_predictor.4.bias": "predictor.hidden.bias",
    "angle_predictor.6.weight": "predictor.out.weight",
    "angle_predictor.6.bias": "predictor.out.bias",
}
_DERIVED = (
    "dst_points",
    "grid_gen.inverse_kernel",
    "grid_gen.padding",
    "grid_gen.target_coord_repr",
)
_DAM = {
    "mlp.0.weight": "hidden.weight",
    "mlp.0.bias": "hidden.bias",
    "mlp.1.weight": "norm.weight",
    "mlp.1.bias": "norm.bias",
    "mlp.3.weight": "out.weight",
    "mlp.3.bias": "out.bias",
}
_HEAD = {
    "weight": "classifier.weight",
    "bottleneck.0.weight": "neck.weight",
    "bottleneck.0.bias": "neck.bias",
    "bottleneck.0.running_mean": "neck.running_mean",
    "bottleneck.0.running_var": "neck.running_var",
    "bottleneck.0.num_batches_tracked": "neck.num_batches_tracked",
}
_HEADS = {"heads": "identity_head", "view_heads": "view_head"}
_DEAD = tuple(
    f"{head}.head_body_distill.{name}"
    for head in _HEADS
    for name in (
        "0.weight",
        "1.weight",
        "1.bias",
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    )
)
# The published buffers were inverted in float32, which at K = 36 costs about 1e-4.
_DERIVED_TOLERANCE = 2e-3


def published_names(config: ModelConfig) -> dict[str, str]:
    """The published code's name of every tensor of our network.

    Args:
        config: a network of ours.

    Returns:
        Published key -> key of :class:`GSAlign`'s state dict.
    """
    names = dict(_FIXED)
    for block in range(config.depth):
        names |= {f"backbone.blocks.{block}.{k}": f"backbone.blocks.{block}.{k}" for k in _BLOCK}
    for block in config.ltps_layers:
        for theirs, ours in _LTPS.items():
            names[f"backbone.blocks.{block}.tps.{theirs}"] = f"backbone.ltps.{block}.{ours}"
    if config.dam.enabled:
        for theirs, ours in _DAM.items():
            names[f"backbone.mask_generator.{theirs}"] = f"dam.mask.{ours}"
    for theirs_head, ours_head in _HEADS.items():
        for theirs, ours in _HEAD.items():
            names[f"{theirs_head}.{theirs}"] = f"{ours_head}.{ours}"
    return names


def _shape(state: Mapping[str, Tensor], key: str, rank: int) -> tuple[int, ...]:
    if key not in state:
        raise CheckpointError(f"the checkpoint lacks {key}: is it one of the published GSAlign?")
    shape = tuple(state[key].shape)
    if len(shape) != rank:
        raise CheckpointError(f"{key} has shape {list(shape)}, wanted {rank} dimensions")
    return shape


def _mlp_ratio(width: int, hidden: int) -> float:
    """The ratio from which ``int(width * ratio)`` gives ``hidden`` back, rounding or not."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def read_config(
    state: Mapping[str, Tensor],
    *,
    image_size: tuple[int, int],
    num_heads: int,
    eta: float,
    drop_path: float,
) -> ModelConfig:
    """Our configuration of a published state dict, sizes read from the shapes.

    Raises:
        CheckpointError: a tensor that tells a size is missing or of the wrong rank, or the sizes
            contradict each other or the arguments.
    """
    width, _, patch, _ = _shape(state, "backbone.patch_embed.proj.weight", 4)
    indices = {
        kind: sorted({int(m[1]) for key in state if (m := re.match(pattern, key))})
        for kind, pattern in (
            ("block", r"backbone\.blocks\.(\d+)\."),
            ("ltps", r"backbone\.blocks\.(\d+)\.tps\."),
        )
    }
    if not indices["block"]:
        raise CheckpointError("the checkpoint has no backbone.blocks: is it a published GSAlign?")
    hidden, _ = _shape(state, "backbone.blocks.0.mlp.fc1.weight", 2)
    ltps = LtpsConfig(layers=(), eta=eta)
    try:
        if indices["ltps"]:
            prefix = f"backbone.blocks.{indices['ltps'][0]}.tps."
            points, _ = _shape(state, prefix + "src_points", 2)
            channels = _shape(state, prefix + "angle_predictor.0.weight", 4)[0]
            neurons = _shape(state, prefix + "angle_predictor.4.weight", 2)[0]
            depth = indices["block"][-1] + 1
            everywhere = indices["ltps"] == list(range(depth))
            ltps = LtpsConfig(
                layers="all" if everywhere else tuple(indices["ltps"]),
                control_points=points,
                eta=eta,
                hidden=(channels, neurons),
            )
        dam = any(key.startswith("backbone.mask_generator.") for key in state)
        return ModelConfig(
            image_size=image_size,
            patch_size=patch,
            width=width,
            depth=indices["block"][-1] + 1,
            num_heads=num_heads,
            mlp_ratio=_mlp_ratio(width, hidden),
            drop_path=drop_path,
            num_identities=_shape(state, "heads.weight", 2)[0],
            num_views=_shape(state, "view_heads.weight", 2)[0],
            ltps=ltps,
            dam=DamConfig(enabled=dam),
        )
    except ValueError as error:
        raise CheckpointError(f"the checkpoint's sizes do not make a network: {error}") from error


def _check_derived(state: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Compare the stored spline constants with ours.

    Raises:
        CheckpointError: one of them differs, so that our warp would not be the checkpoint's.
    """
    points = control_grid(config.ltps.control_points)
    count = len(points)
    values = torch.eye(count, dtype=torch.float64).unsqueeze(0)
    inverse = gsalign_kernels.tps_solve(points.unsqueeze(0), values, implementation="auto")[0]
    basis = gsalign_kernels.tps_basis(points, config.grid, implementation="auto")
    basis = basis.to("cpu", torch.float64)

    def compare(key: str, ours: Tensor, theirs: Tensor) -> None:
        limit = _DERIVED_TOLERANCE * max(1.0, float(ours.abs().max()))
        if theirs.shape != ours.shape:
            raise CheckpointError(
                f"{key} belongs to another map: with image_size {config.image_size} wanted shape "
                f"{list(ours.shape)}, got {list(theirs.shape)}"
            )
        error = float((theirs - ours).abs().max())
        if not error <= limit:
            raise CheckpointError(
                f"{key} differs from the thin-plate spline on a regular grid of {count} points "
                f"over {config.grid[0]}x{config.grid[1]} patches by {error:.3g} (allowed "
                f"{limit:.3g}): the checkpoint is damaged, or image_size is not the one it was "
                "trained with"
            )

    for layer in config.ltps_layers:
        prefix = f"backbone.blocks.{layer}.tps."
        stored = {
            name: state[prefix + name].to("cpu", torch.float64)
            for name in _DERIVED
            if prefix + name in state
        }
        if "dst_points" in stored:
            compare(prefix + "dst_points", points, stored["dst_points"])
        key = "grid_gen.padding"
        if key in stored:
            compare(prefix + key, torch.zeros(3, 2, dtype=torch.float64), stored[key])
        key = "grid_gen.inverse_kernel"
        if key in stored:
            # The last three columns only ever meet the zero padding, so the rest is what counts.
            if tuple(stored[key].shape) != (count + 3, count + 3):
                raise CheckpointError(
                    f"{prefix + key} has shape {list(stored[key].shape)}, wanted "
                    f"{[count + 3, count + 3]} for {count} control points"
                )
            compare(prefix + key, inverse, stored[key][:, :count])
        key = "grid_gen.target_coord_repr"
        if key in stored:
            wanted = (len(basis), count + 3)
            if tuple(stored[key].shape) != wanted:
                raise CheckpointError(
                    f"{prefix + key} belongs to another map: with image_size "
                    f"{config.image_size} wanted shape {list(wanted)}, got "
                    f"{list(stored[key].shape)}"
                )
            compare(prefix + key, basis, stored[key] @ inverse)


def load_published(
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    *,
    image_size: tuple[int, int],
    num_heads: int = 12,
    eta: float = 0.1,
    drop_path: float = 0.0,
) -> GSAlign:
    """Build a network from a checkpoint of the published code (WHU-liqiaoqiao/GSAlign).

    Width, depth, MLP ratio, patch size, number and place of control points and the numbers of
    classes are read from the shapes; blocks without ``tps`` and a checkpoint without
    ``mask_generator`` (the VDT baseline) are understood. What no shape tells is an argument. Every
    key is accounted for: used; derivable, and then compared with what we derive; or known dead
    (``head_body_distill``). Derivable and dead keys may be absent.

    Args:
        checkpoint: path of a ``.pth`` (read with ``weights_only=True``) or ``.safetensors`` file,
            or a state dict; the tensors may lie under ``"model"``.
        image_size: (height, width) in pixels the checkpoint was trained with.
        num_heads: attention heads.
        eta: weight of the warped map.
        drop_path: stochastic depth for training on; a checkpoint does not tell (published: 0.1).

    Returns:
        The network in float32 on the CPU, in evaluation mode.

    Raises:
        CheckpointError: the file is missing or damaged, keys are missing or unknown, or shapes or
            constants contradict each other or the arguments.
    """
    state = read_state_dict(checkpoint)
    config = read_config(
        state,
        image_size=(int(image_size[0]), int(image_size[1])),
        num_heads=num_heads,
        eta=eta,
        drop_path=drop_path,
    )
    names = published_names(config)
    derived = {f"backbone.blocks.{b}.tps.{name}" for b in config.ltps_layers for name in _DERIVED}
    missing = [key for key in names if key not in state]
    unknown = [key for key in state if key not in names and key not in derived | set(_DEAD)]
    if missing or unknown:
        problems = []
        if missing:
            problems.append(f"missing {name_some(missing)}")
        if unknown:
            problems.append(f"unknown {name_some(unknown)}")
        raise CheckpointError(f"not a checkpoint of the published GSAlign: {'; '.join(problems)}")

    positions = state["backbone.pos_embed"].shape[1]
    patches = config.grid[0] * config.grid[1]
    if positions != PREFIX + patches:
        raise CheckpointError(
            f"backbone.pos_embed has {positions} positions, but image_size {config.image_size} "
            f"with patches of {config.patch_size} needs {PREFIX + patches}: give the image_size "
            "the checkpoint was trained with"
        )
    _check_derived(state, config)
    model = without_values(config)
    copy_weights(model, {ours: state[theirs] for theirs, ours in names.items()}, names=names)
    return model.eval()
