"""The case of the prototype family, beside the loop over labels it replaces."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.functional import normalize

from benchmarks.case import (
    Case,
    Choice,
    Outputs,
    Provider,
    Tensors,
    compiled,
    eager,
    implementations,
    normal,
    uniform,
)
from gsalign_kernels import masked_prototype_loss
from gsalign_kernels.reference import prototype as reference_prototype

FAMILY = "prototype"
OPERATORS = ("masked_prototype_loss",)

WIDTH = 768
PER_LABEL = 4


def cases(choice: Choice) -> list[Case]:
    """A training batch: 32 identities, four images each."""
    device = choice.device
    batch = 16 if choice.quick else 128

    def inputs(device: torch.device) -> Tensors:
        return {
            "features": normal(batch, WIDTH, seed=41, device=device, dtype=torch.float32),
            "masks": uniform(batch, WIDTH, seed=42, device=device),
            "labels": torch.arange(batch, device=device) // PER_LABEL,
        }

    def call(tensors: Tensors, implementation: str) -> Outputs:
        return masked_prototype_loss(
            tensors["features"],
            tensors["masks"],
            tensors["labels"],
            implementation=implementation,
        )

    def plain(tensors: Tensors) -> Outputs:
        return reference_prototype.masked_prototype_loss(
            tensors["features"], tensors["masks"], tensors["labels"]
        )

    return [
        Case(
            op="masked_prototype_loss",
            shape=f"B{batch} D{WIDTH} labels {batch // PER_LABEL}",
            dtype=torch.float32,
            inputs=inputs,
            leaves=("features", "masks"),
            reference=partial(call, implementation="reference"),
            providers=(
                eager(partial(call, implementation="reference")),
                compiled(plain, device, enabled=choice.compile),
                Provider("loop over labels", loop_over_labels),
                *implementations("masked_prototype_loss", device, call),
            ),
        )
    ]


def loop_over_labels(tensors: Tensors) -> Outputs:
    """One class after the other, as the loss is usually written; waits for the device each time."""
    features, masks, labels = tensors["features"], tensors["masks"], tensors["labels"]
    unit = normalize(features, dim=1)
    alignment = features.new_zeros(())
    for label in labels.unique():
        chosen = labels == label
        centre = normalize(features[chosen].mean(dim=0), dim=0)
        prototypes = normalize(centre * masks[chosen], dim=1)
        alignment = alignment + (unit[chosen] - prototypes).square().sum()
    entropy = -(masks * masks.clamp(min=1e-6).log()).mean()
    return alignment / features.numel(), entropy
