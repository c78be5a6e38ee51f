"""One of several processes of a test: runs of two processes, one of them in two parts."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tiny_run import TINY

from gsalign.config import Config, load_config
from gsalign.engine.build import build_trainer

SHARED = (
    *TINY,
    "kernels=reference",
    "data.identities_per_batch=4",
    "schedule.name=constant",
    "training.evaluate_every=2",
)

# Without stochastic depth, whose draws are each process's own, and at a rate worth the name.
COMPARED = ("model.drop_path=0", "schedule.warmup=0", "training.evaluate_every=0")
COMPARED_RUNS = {
    "global": (),
    "global_own_points": (
        "model.ltps.points_per_image=true",
        "model.losses.deformation_warmup=3",
    ),
    "own": ("training.global_losses=false",),
    "global_parts": ("model.parts=2", "model.part_cells=2", "model.losses.part_labels=1"),
    "global_upright": ("model.orientation.enabled=true",),
    "global_upright_by_parts": ("model.orientation.enabled=true", "model.orientation.reads=parts"),
}


def config_of(people: Path, folder: Path, name: str, *overrides: str) -> Config:
    """The settings of a run; for a test that runs one of them alone, too."""
    return load_config(
        None, [*SHARED, f"data.root={people}", f"output={folder / name}", *overrides]
    )


def main(people: Path, folder: Path) -> None:
    """Run in full; then half of it, and the other half resumed; then what is compared."""
    torch.set_num_threads(1)
    build_trainer(config_of(people, folder, "whole")).train()
    build_trainer(config_of(people, folder, "parts", "training.iterations=2")).train()
    build_trainer(config_of(people, folder, "parts"), resume=True).train()
    for name, overrides in COMPARED_RUNS.items():
        build_trainer(config_of(people, folder, name, *COMPARED, *overrides)).train()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
