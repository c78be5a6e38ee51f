"""Cases of the ranking family: the evaluation's ranker beside a full sort of every row."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.case import FORWARD, Case, Choice, Outputs, Provider, Tensors, eager, uniform
from gsalign.evaluation.ranking import Ranker, rank, ranking_report

FAMILY = "ranking"
OPERATORS = ("rank",)

# Queries and gallery images: a sixth and all of Market-1501's order of size, as the form that
# sorts takes seconds.
SIZES = {"cpu": (1000, 20_000), "cuda": (3000, 20_000)}
QUICK = (20, 400)
PEOPLE = 750
CAMERAS = 6


def cases(choice: Choice) -> list[Case]:
    """One evaluation of random distances."""
    queries, gallery = QUICK if choice.quick else SIZES[choice.device.type]

    def labels(count: int, different: int, seed: int, device: torch.device) -> torch.Tensor:
        return uniform(count, seed=seed, device=device).mul(different).long()

    def inputs(device: torch.device) -> Tensors:
        return {
            "distances": uniform(queries, gallery, seed=71, device=device),
            "query_identities": labels(queries, PEOPLE, 72, device),
            "gallery_identities": labels(gallery, PEOPLE, 73, device),
            "query_cameras": labels(queries, CAMERAS, 74, device),
            "gallery_cameras": labels(gallery, CAMERAS, 75, device),
        }

    on_gpu = choice.device.type == "cuda"
    compiled = ranking_report()["cpp"] or ("ranks on the CPU" if on_gpu else "")
    return [
        Case(
            op="rank",
            shape=f"Q{queries} G{gallery}",
            dtype=torch.float32,
            inputs=inputs,
            leaves=(),
            reference=partial(scores, ranker="numpy"),
            providers=(
                eager(partial(scores, ranker="numpy"), note="NumPy: a stable argsort of every row"),
                Provider("torch", partial(scores, ranker="torch"), ours=True),
                Provider(
                    "cpp", partial(scores, ranker="cpp"), unavailable=compiled or None, ours=True
                ),
            ),
            passes=(FORWARD,),
        )
    ]


def scores(tensors: Tensors, *, ranker: Ranker) -> Outputs:
    """AP, INP and rank of the first positive of every query; 0 where it has none."""
    columns = [tensor.cpu().numpy() for name, tensor in tensors.items() if name != "distances"]
    found = rank(tensors["distances"], *columns, ranker=ranker)
    shares = (
        torch.from_numpy(column).nan_to_num() for column in (found.average_precision, found.inp)
    )
    return (*shares, torch.from_numpy(found.first_rank))
