"""A training of some hundred steps on made-up people, the same but for who serves the operators."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from gsalign.engine.config import OptimizerConfig
from gsalign.engine.optimizer import build_optimizer
from gsalign.evaluation import EvaluationResult, evaluate
from gsalign.model import GSAlign, ModelConfig
from gsalign_kernels import use_kernels

PEOPLE = 12
IMAGES = 8
"""Training images of each."""

WARMUP = 50
RATE = 0.001
CLIP = 5.0

TINY = ModelConfig(
    image_size=(64, 32),
    patch_size=8,
    width=32,
    depth=2,
    num_heads=4,
    drop_path=0.0,
    num_identities=PEOPLE,
    parts=2,
    ltps={"hidden": (16, 8)},
)


@dataclass(frozen=True)
class Trained:
    """What a training left.

    Attributes:
        curve: sum of the losses at every step, float64 ``[steps]``.
        distances: cosine distances of new images, ``[queries, gallery]``.
        result: of a search with them.
    """

    curve: Tensor
    distances: Tensor
    result: EvaluationResult


def people(config: ModelConfig, per_person: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images ``[N, 3, H, W]``, identities and views: a blotch per person, paler from above.

    The blotches are the same for every seed, the noise on them is not.
    """
    blotches = torch.randn(PEOPLE, 3, 8, 4, generator=torch.Generator().manual_seed(0))
    blotches = functional.interpolate(blotches, size=config.image_size, mode="bicubic")
    identities = torch.arange(PEOPLE).repeat_interleave(per_person)
    views = torch.arange(len(identities)) % 2
    noise = torch.randn(
        len(identities), 3, *config.image_size, generator=torch.Generator().manual_seed(seed)
    )
    images = blotches[identities] + 0.5 * noise
    from_above = (views == 1).view(-1, 1, 1, 1)
    images = torch.where(from_above, images * 0.6 + 0.3, images)
    return images.clamp(-1.5, 1.5), identities, views


def turned(config: ModelConfig) -> GSAlign:
    """A fresh network whose splines are off the lattice and whose angles are off 0.

    There the loss has kinks, at which any rounding decides the sign of a gradient.
    """
    torch.manual_seed(0)
    network = GSAlign(config)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for layer, ltps in enumerate(network.backbone.ltps.values()):
            ltps.source_points += 0.15 * torch.randn(ltps.source_points.shape, generator=generator)
            ltps.predictor.out.bias += 0.3 * (-1) ** layer
    return network


def train(
    kernels: str,
    steps: int,
    *,
    config: ModelConfig = TINY,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    identities_per_batch: int = 4,
) -> Trained:
    """Train with K = 4 and look at what became of it.

    Args:
        kernels: who serves the operators.
        steps: of the optimizer, SGD.
        config: the network; without stochastic depth.
        dtype: float32, float64, or bfloat16 by autocast.
        device: where.
        identities_per_batch: P.
    """
    half = torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    network = turned(config).to(device, wide).train()
    optimizer = build_optimizer(network, OptimizerConfig(lr=RATE))
    images, identities, views = (t.to(device) for t in people(config, IMAGES, seed=1))
    images = images.to(wide)
    generator = torch.Generator().manual_seed(5)
    curve = []
    with use_kernels(kernels):
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, (step + 1) / WARMUP)
            who = torch.randperm(PEOPLE, generator=generator)[:identities_per_batch]
            chosen = [p * IMAGES + torch.randperm(IMAGES, generator=generator)[:4] for p in who]
            batch = torch.cat(chosen).to(device)
            with half:
                losses = network.losses(images[batch], identities[batch], views[batch])
            total = torch.stack(list(losses.values())).sum()
            total.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            curve.append(total.detach())
        return Trained(torch.stack(curve).double().cpu(), *searched(network, half, wide, device))


def searched(
    network: GSAlign, half: torch.autocast, wide: torch.dtype, device: str
) -> tuple[Tensor, EvaluationResult]:
    """Distances between new images of the people, and the result of the search, across views."""
    splits = [people(network.config, 4, seed) for seed in (2, 3)]
    with torch.no_grad(), half:
        query, gallery = (
            functional.normalize(network.embed(images.to(device, wide)).to(wide)).cpu()
            for images, _, _ in splits
        )
    distances = 1 - query @ gallery.T
    (_, asked, asked_views), (_, there, there_views) = splits
    result = evaluate(
        distances,
        query_identities=asked,
        gallery_identities=there,
        query_cameras=asked_views,
        gallery_cameras=there_views,
    )
    return distances, result
