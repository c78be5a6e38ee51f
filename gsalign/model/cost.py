"""What a network costs: parameters and multiply-accumulates, part by part."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from gsalign.model.config import ModelConfig
from gsalign.model.network import GSAlign
from gsalign_kernels import use_kernels

ALIGNMENT, PATCHES, BLOCKS = "alignment", "patch embedding", "ViT blocks"
LTPS, PARTS = "LTPS", "parts"


@dataclass(frozen=True)
class Cost:
    """What one part of a network costs.

    Attributes:
        parameters: how many it has, statistics not counted.
        macs: multiply-accumulates of matrix products, convolutions and attention for the embedding
            of one image.
        all_tokens: the same when the last block computes every token, as the published code does.
    """

    parameters: int = 0
    macs: int = 0
    all_tokens: int = 0


def count_cost(config: ModelConfig) -> dict[str, Cost]:
    """The cost of every part of a network; nothing is computed, nothing held in memory.

    Warps, norms, activations and sums are no multiply-accumulates here; they are below a hundredth.

    Args:
        config: the network.

    Returns:
        Cost by the name of the part, in the order of the computation, ``"total"`` last.
    """
    with torch.device("meta"):
        model = GSAlign(config).eval()
        images = torch.empty(1, 3, *config.image_size)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}

    def parameters(*prefixes: str) -> int:
        return sum(size for name, size in sizes.items() if name.startswith(prefixes))

    lazy, full = _macs(model, images, False), _macs(model, images, True)
    names = {
        ALIGNMENT: ("uprighting.",),
        PATCHES: ("backbone.patch_embed.",),
        "tokens and positions": ("backbone.class_", "backbone.view_", "backbone.position"),
        BLOCKS: ("backbone.blocks.",),
        LTPS: ("backbone.ltps.",),
        "final norm": ("backbone.norm.",),
        PARTS: ("parts.",),
        "DAM (training)": ("dam.",),
        "identity head": ("identity_head.",),
        "view head (training)": ("view_head.",),
    }
    costs = {
        name: Cost(parameters(*prefixes), lazy.get(name, 0), full.get(name, 0))
        for name, prefixes in names.items()
        if parameters(*prefixes)
    }
    total = Cost(
        sum(sizes.values()),
        sum(cost.macs for cost in costs.values()),
        sum(cost.all_tokens for cost in costs.values()),
    )
    return {**costs, "total": total}


def _macs(model: GSAlign, images: torch.Tensor, all_tokens: bool) -> dict[str, int]:
    """Multiply-accumulates by part; the heads' own are in training only."""
    counter = FlopCounterMode(display=False)
    all_tokens = all_tokens or model.parts is not None
    with use_kernels("reference"), torch.no_grad(), counter:
        if model.uprighting is not None:
            model.uprighting.see(images)
        aligned = counter.get_total_flops()
        patches = model.backbone.patches(images)
        before = counter.get_total_flops()
        tokens, *_ = model.backbone(patches, all_tokens=all_tokens)
        backbone = counter.get_total_flops() - before
        if model.parts is not None:
            model.parts(tokens, images)
    by_module = counter.get_flop_counts()
    ltps = sum(
        sum(flops.values())
        for name, flops in by_module.items()
        if name.rpartition(".")[0].endswith("ltps") and name.rpartition(".")[2].isdecimal()
    )
    after = counter.get_total_flops() - before - backbone
    flops = {
        ALIGNMENT: aligned,
        PATCHES: before - aligned,
        BLOCKS: backbone - ltps,
        LTPS: ltps,
        PARTS: after,
    }
    return {name: count // 2 for name, count in flops.items()}
