"""Starting from ImageNet weights of a plain ViT, with an account of every tensor."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import timm
import timm.models.vision_transformer
import torch
from torch import Tensor
from torch.nn import functional

from gsalign.errors import CheckpointError
from gsalign.model.ltps import PREFIX
from gsalign.model.network import GSAlign
from gsalign.model.pretrained_report import PretrainedReport
from gsalign.model.weights import name_some, read_state_dict

_FILE_SUFFIXES = {".pth", ".pt", ".bin", ".safetensors"}
_RENAMED = {"cls_token": "backbone.class_token", "pos_embed": "backbone.position"}
_TAKEN = ("patch_embed.proj.", "blocks.", "norm.")
# Classifiers and what only they use; dist_token is DeiT's, which has no place here.
_LEFT_OUT = ("head.", "head_dist.", "pre_logits.", "fc_norm.", "dist_token")


def resize_position(position: Tensor, size: tuple[int, int], *, prefix: int = 1) -> Tensor:
    """A ViT's position embedding fitted to another map, with a slot for the view token.

    Args:
        position: ``[1, prefix + g * g, C]``, a square map.
        size: rows and columns of the new map.
        prefix: slots before the map; the first is the class token's, the others are dropped.

    Returns:
        ``[1, 2 + rows * columns, C]``: class, view, map. The map is resized bilinearly
        (``align_corners=False``); the view slot starts as the position of the *old* map's first
        patch, as in the published code.

    Raises:
        CheckpointError: the map is not square.
    """
    old = position[:, prefix:]
    side = math.isqrt(old.shape[1])
    if side * side != old.shape[1]:
        raise CheckpointError(
            f"pos_embed has {old.shape[1]} positions after {prefix} prefix tokens, which is no "
            "square map"
        )
    new = old
    if size != (side, side):
        image = old.transpose(1, 2).unflatten(2, (side, side))
        resized = functional.interpolate(image, size=size, mode="bilinear", align_corners=False)
        new = resized.flatten(2).transpose(1, 2)
    return torch.cat([position[:, :1], old[:, :1], new], dim=1)


def _timm_state(name: str) -> dict[str, Tensor]:
    if not timm.is_model(name.split(".")[0]):
        raise CheckpointError(
            f"pretrained {name!r} is neither a file nor a model of timm: give the path of a "
            ".pth or .safetensors file, or a name such as vit_base_patch16_224"
        )
    try:
        source = timm.create_model(name, pretrained=True)
    except Exception as error:  # whatever a download can fail with
        raise CheckpointError(
            f"cannot get the weights of timm's {name}: {error}; download them elsewhere and give "
            "the file's path"
        ) from error
    if not isinstance(source, timm.models.vision_transformer.VisionTransformer):
        raise CheckpointError(f"timm's {name} is a {type(source).__name__}, wanted a plain ViT")
    return dict(source.state_dict())


def load_pretrained(
    model: GSAlign, source: str | os.PathLike[str] | Mapping[str, Tensor]
) -> PretrainedReport:
    """Start the backbone from the weights of a plain ViT; all or nothing.

    The position embedding is resized (``resize_position``), the view token set to 0; LTPS, DAM
    and heads keep their initial values.

    Args:
        model: the network.
        source: a model name of timm, the path of a ``.pth`` or ``.safetensors`` file with timm's
            names, or a state dict.

    Returns:
        What became of every tensor.

    Raises:
        CheckpointError: the weights cannot be had, a tensor has a name we do not know or another
            shape than ours, or one of ours is missing.
    """
    if isinstance(source, Mapping):
        label, state = "a state dict", read_state_dict(source)
    else:
        label = os.fspath(source)
        is_file = Path(label).is_file() or Path(label).suffix in _FILE_SUFFIXES
        state = read_state_dict(label) if is_file else _timm_state(label)

    ours = model.state_dict()
    found: dict[str, Tensor] = {}
    left_out, unknown = [], []
    for name, tensor in state.items():
        target = _RENAMED.get(name, f"backbone.{name}")
        if name in _RENAMED or (name.startswith(_TAKEN) and target in ours):
            found[target] = tensor
        elif name.startswith(_LEFT_OUT):
            left_out.append(name)
        else:
            unknown.append(name)
    wanted = [
        name
        for name in ours
        if name.startswith("backbone.")
        and not name.startswith("backbone.ltps.")
        and name != "backbone.view_token"
    ]
    missing = [name for name in wanted if name not in found]
    if unknown or missing:
        problems = [f"unknown {name_some(unknown)}"] if unknown else []
        problems += [f"nothing for {name_some(missing)}"] if missing else []
        raise CheckpointError(
            f"{label} does not fit a plain ViT of depth {model.config.depth}: {'; '.join(problems)}"
        )

    position = found["backbone.position"]
    if position.ndim != 3:
        raise CheckpointError(f"pos_embed has shape {list(position.shape)}, wanted [1, N, C]")
    prefix = 2 if "dist_token" in state else 1
    found["backbone.position"] = resize_position(position, model.config.grid, prefix=prefix)
    resized = (
        f"position embedding {position.shape[1] - prefix} + {prefix} -> "
        f"{model.config.grid[0]}x{model.config.grid[1]} + {PREFIX}"
    )
    found["backbone.view_token"] = torch.zeros_like(ours["backbone.view_token"])
    differing = [
        f"{name} is {list(tensor.shape)}, the network has {list(ours[name].shape)}"
        for name, tensor in found.items()
        if tensor.shape != ours[name].shape
    ]
    if differing:
        raise CheckpointError(f"{label} does not fit the network: {name_some(differing)}")
    model.load_state_dict({**ours, **found})
    return PretrainedReport(
        source=label,
        loaded=tuple(sorted(found)),
        resized=resized,
        left_out=tuple(left_out),
        untouched=tuple(name for name, _ in model.named_parameters() if name not in found),
    )
