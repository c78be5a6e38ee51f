"""Cases of the distance family: part distances beside the form that keeps every part in memory."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.case import (
    FORWARD,
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
from gsalign_kernels import part_distance

FAMILY = "distance"
OPERATORS = ("part_distance",)

PARTS = 6
# Queries, gallery images and width: as large as the form with every part in memory still fits.
SIZES = {"cpu": (512, 4096, 256), "cuda": (2048, 32768, 768)}
QUICK = (16, 64, 32)


def cases(choice: Choice) -> list[Case]:
    """One search per kind of visibility: of 0 and 1, and between them."""
    sizes = QUICK if choice.quick else SIZES[choice.device.type]
    return [_distance(choice, *sizes, binary=binary) for binary in (True, False)]


def _distance(choice: Choice, queries: int, gallery: int, width: int, *, binary: bool) -> Case:
    device = choice.device

    def visibility(count: int, seed: int, device: torch.device) -> Tensor:
        figures = uniform(count, PARTS, seed=seed, device=device)
        return (figures > 0.3).float() if binary else figures

    def inputs(device: torch.device) -> Tensors:
        made = partial(normal, device=device, dtype=torch.float32)
        return {
            "query": made(queries, PARTS, width, seed=61),
            "gallery": made(gallery, PARTS, width, seed=62),
            "query_visibility": visibility(queries, 63, device),
            "gallery_visibility": visibility(gallery, 64, device),
        }

    def call(tensors: Tensors, implementation: str) -> Outputs:
        return (part_distance(**tensors, unmatched=2.0, implementation=implementation),)

    kind = "binary" if binary else "continuous"
    return Case(
        op="part_distance",
        shape=f"Q{queries} G{gallery} P{PARTS} D{width} {kind}",
        dtype=torch.float32,
        inputs=inputs,
        leaves=(),
        reference=partial(call, implementation="reference"),
        providers=(
            eager(partial(call, implementation="reference"), note="in tiles"),
            Provider("every part in memory", parts_in_memory),
            compiled(
                parts_in_memory,
                device,
                enabled=choice.compile and binary,
                name="torch.compile of every part in memory",
            ),
            Provider(
                "matrix product alone",
                matrix_product,
                slack=math.inf,
                note="no distances: the product of their size, [Q, P D] by [P D, G], for its rate",
            ),
            *implementations("part_distance", device, call),
        ),
        passes=(FORWARD,),
    )


def parts_in_memory(tensors: Tensors) -> Outputs:
    """Distances part by part, then their weighted mean: parts x queries x gallery in memory."""
    query, gallery = (normalize(tensors[side], dim=2) for side in ("query", "gallery"))
    query_share, gallery_share = (
        tensors[f"{side}_visibility"].sqrt() for side in ("query", "gallery")
    )
    apart = 1.0 - torch.einsum("qpd,gpd->pqg", query, gallery)
    weight = torch.einsum("qp,gp->pqg", query_share, gallery_share)
    total = weight.sum(dim=0)
    mean = (weight * apart).sum(dim=0) / total
    return (mean.masked_fill(total == 0, 2.0),)


def matrix_product(tensors: Tensors) -> Outputs:
    """The product that every form contains."""
    return (tensors["query"].flatten(1) @ tensors["gallery"].flatten(1).T,)
