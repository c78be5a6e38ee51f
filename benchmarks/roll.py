"""The predictor of the roll, trained alone, against the truth of a generated set.

``python -m benchmarks.roll --data data/demo --steps 800``; what it learns to tell is in
docs/alignment.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from gsalign.data import (
    AugmentationConfig,
    DataConfig,
    evaluation_loader,
    load_dataset,
    train_loader,
)
from gsalign.data.synthetic import read_truth
from gsalign.evaluation import roll_agreement
from gsalign.model.config import OrientationConfig
from gsalign.model.orientation import Uprighting, orientation_loss


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate on the query and gallery images, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roll", description=__doc__)
    parser.add_argument("--data", required=True, metavar="DIR", help="a generated set")
    parser.add_argument("--steps", type=int, default=800, help="of four images a person")
    parser.add_argument("--people", type=int, default=16, help="people of a step")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate of AdamW")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)

    data = DataConfig(
        root=Path(arguments.data),
        image_size=(128, 64),
        identities_per_batch=arguments.people,
        num_workers=0,
        cache="memory",
        augmentation=AugmentationConfig(
            crop_padding=0, rotation=0.0, color_jitter=0.1, erasing=0.0
        ),
    )
    dataset = load_dataset(data)
    torch.manual_seed(arguments.seed)
    uprighting = Uprighting(data.image_size, OrientationConfig(enabled=True))
    optimizer = torch.optim.AdamW(
        uprighting.parameters(), lr=arguments.lr, betas=(0.9, 0.98), weight_decay=0.05
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * step / arguments.steps))
        ),
    )
    span = (0, arguments.steps)
    for batch in train_loader(dataset.train, data, seed=arguments.seed, iterations=span):
        optimizer.zero_grad()
        rolls = uprighting.look(batch.images)
        orientation_loss(*rolls, batch.identities, batch.views).backward()
        optimizer.step()
        schedule.step()

    truth = {dataset.root / row.path: math.radians(row.roll) for row in read_truth(dataset.root)}
    angles: list[float] = []
    true: list[float] = []
    aerial: list[bool] = []
    with torch.inference_mode():
        for split in (dataset.query, dataset.gallery):
            for batch in evaluation_loader(split, data):
                _, direction = uprighting(batch.images)
                angles += torch.atan2(direction[:, 1], direction[:, 0]).tolist()
                true += [truth[Path(path)] for path in batch.paths]
                aerial += (batch.views == 1).tolist()
    views = {"aerial": np.asarray(aerial), "ground": ~np.asarray(aerial)}
    agreement = roll_agreement({"image": np.asarray(angles)}, np.asarray(true), views)
    Console().print(agreement.as_table())


if __name__ == "__main__":
    main()
