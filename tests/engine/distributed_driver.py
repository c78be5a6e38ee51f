"""One of several processes of a test: three runs, one of them in two parts."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tiny_run import TINY

from gsalign.config import load_config
from gsalign.engine.build import build_trainer


def main(people: str, folder: str) -> None:
    """Run in full; then half of it, and the other half resumed."""
    torch.set_num_threads(1)
    settings = [
        *TINY,
        "kernels=reference",
        "data.identities_per_batch=4",
        "schedule.name=constant",
        "training.evaluate_every=2",
        f"data.root={people}",
    ]

    def config(name: str, iterations: int):
        output = Path(folder) / name
        return load_config(
            None, [*settings, f"output={output}", f"training.iterations={iterations}"]
        )

    build_trainer(config("whole", 4)).train()
    build_trainer(config("parts", 2)).train()
    build_trainer(config("parts", 4), resume=True).train()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
