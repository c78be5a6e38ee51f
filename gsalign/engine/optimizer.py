"""The optimizer, and which weight decay each parameter gets."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from gsalign.engine.config import OptimizerConfig

_NORMS = (nn.LayerNorm, nn.GroupNorm, _NormBase)
FUSED_DEVICES = ("cpu", "cuda")
"""Devices on which PyTorch updates all parameters of a group in one kernel."""

_LTPS = "backbone.ltps."
_TOKENS = ("class_token", "view_token", "position", "source_points")


def parameter_kinds(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, str]]:
    """Name, parameter and kind of every trained parameter, in the order of the module.

    The kind is ``"bias"`` (of norms too), ``"norm"`` (the weight of one), ``"tokens"`` (class and
    view token, position embedding, control points of the splines) or ``"weight"``.

    Args:
        model: the network; frozen parameters are passed over.
    """
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if name == "bias" or name.endswith("_bias"):
                kind = "bias"
            elif isinstance(module, _NORMS):
                kind = "norm"
            elif name in _TOKENS:
                kind = "tokens"
            else:
                kind = "weight"
            yield f"{path}.{name}" if path else name, parameter, kind


def has_ltps_rate(config: OptimizerConfig) -> bool:
    """Whether LTPS learns at a rate of its own."""
    return config.ltps_lr_factor != 1.0 or config.ltps_warmup > 0.0


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, object]]:
    """Parameters grouped by weight decay, so that as few kernels as possible are launched.

    Where LTPS learns at a rate of its own, also by whether they are of it.

    Args:
        model: the network.
        config: the four weight decays, and the rate of LTPS.

    Returns:
        Groups for a PyTorch optimizer: ``params``, ``names`` in the same order, ``weight_decay``,
        ``ltps`` (whether the rate is that of LTPS).
    """
    apart = has_ltps_rate(config)
    decays = {
        "weight": config.weight_decay,
        "norm": config.weight_decay_norm,
        "bias": config.weight_decay_bias,
        "tokens": config.weight_decay_tokens,
    }
    groups: dict[tuple[float, bool], dict[str, list[object]]] = {}
    for name, parameter, kind in parameter_kinds(model):
        given = decays[kind]
        decay = config.weight_decay if given is None else given
        ltps = apart and name.startswith(_LTPS)
        group = groups.setdefault((decay, ltps), {"params": [], "names": []})
        group["params"].append(parameter)
        group["names"].append(name)
    return [
        {**group, "weight_decay": decay, "ltps": ltps} for (decay, ltps), group in groups.items()
    ]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The optimizer that a configuration names, over the trained parameters of a network.

    Fused where PyTorch has it: all of a group in one pass, and a step that fp16's scaler has to
    leave out is left out on the device, where the other kinds make the host ask.
    """
    groups = parameter_groups(model, config)
    # None leaves the choice to PyTorch.
    fused = all(p.device.type in FUSED_DEVICES for p in model.parameters()) or None
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=fused)
