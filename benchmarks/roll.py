"""What tells the roll of a person, trained alone, against the truth of a generated set.

``python -m benchmarks.roll --data data/demo --reads parts --steps 2400``; what the figures mean is
in docs/alignment.md. ``--reads maps`` trains nothing: it is how well the true label maps tell the
roll, which is as much as a network can learn from them.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional

from benchmarks.rows import conditions_here
from gsalign.data import (
    AugmentationConfig,
    DataConfig,
    ReIDDataset,
    evaluation_loader,
    load_dataset,
    train_loader,
)
from gsalign.data.synthetic import group_labels, read_part_labels, read_truth
from gsalign.evaluation.roll_agreement import RollMatch, roll_agreement
from gsalign.files import atomic_write
from gsalign.model import ModelConfig
from gsalign.model.orientation import Uprighting
from gsalign.model.orientation_parts import body_axis
from gsalign.model.uprighting import create_uprighting, save_uprighting

IMAGE_SIZE = (128, 64)
CONDITIONS = ("device", "threads", "torch", "commit", "date")
COLUMNS = (
    "data", "reads", "steps", "people", "seed", "view", "images", "correlation",
    "median_error_degrees", "within_90", *CONDITIONS,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate on the query and gallery images, print the table, keep it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roll", description=__doc__)
    parser.add_argument("--data", required=True, metavar="DIR", help="a generated set")
    parser.add_argument("--reads", choices=("rays", "parts", "maps"), default="rays")
    parser.add_argument("--steps", type=int, default=800, help="of four images a person")
    parser.add_argument("--people", type=int, default=16, help="people of a step")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate of AdamW")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, metavar="FILE.csv", help="add the rows, instead of those of such a run"
    )
    parser.add_argument(
        "--save",
        type=Path,
        metavar="FILE.safetensors",
        help="keep what was trained, for model.orientation.pretrained",
    )
    arguments = parser.parse_args(argv)
    if arguments.save is not None and arguments.reads == "maps":
        parser.error("--save: --reads maps trains nothing that could be kept")
    if arguments.save is not None and arguments.save.is_dir():  # now, and not after the training
        parser.error(f"--save {arguments.save} is a folder; wanted a file")

    data = DataConfig(
        root=Path(arguments.data),
        image_size=IMAGE_SIZE,
        identities_per_batch=arguments.people,
        num_workers=0,
        cache="memory",
        augmentation=AugmentationConfig(
            crop_padding=0, rotation=0.0, color_jitter=0.1, erasing=0.0
        ),
    )
    dataset = load_dataset(data)
    uprighting = None
    if arguments.reads == "maps":
        arguments.steps = arguments.people = arguments.seed = 0
    else:
        uprighting = train(dataset, data, arguments)
        if arguments.save is not None:
            save_uprighting(uprighting, arguments.save)
    matches = agreement(dataset, data, uprighting)
    if arguments.out is not None:
        keep(arguments.out, arguments, matches)


def train(dataset: ReIDDataset, data: DataConfig, arguments: argparse.Namespace) -> Uprighting:
    """What turns images, trained by its own loss alone."""
    orientation = {"enabled": True, "reads": arguments.reads}
    config = ModelConfig.model_validate({"image_size": IMAGE_SIZE, "orientation": orientation})
    torch.manual_seed(arguments.seed)
    uprighting = create_uprighting(config)
    optimizer = torch.optim.AdamW(
        uprighting.parameters(), lr=arguments.lr, betas=(0.9, 0.98), weight_decay=0.05
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * step / arguments.steps))
        ),
    )
    batches = train_loader(
        dataset.train,
        data,
        seed=arguments.seed,
        iterations=(0, arguments.steps),
        part_groups=config.label_groups,
    )
    for batch in batches:
        optimizer.zero_grad()
        looked = uprighting.look(batch.images, batch.label_maps())
        uprighting.loss(looked, batch.identities, batch.views).backward()
        optimizer.step()
        schedule.step()
    return uprighting


def agreement(
    dataset: ReIDDataset, data: DataConfig, uprighting: Uprighting | None
) -> tuple[RollMatch, ...]:
    """How well the rolls of the query and gallery images are told, which is printed.

    Args:
        dataset: a generated set.
        data: how it is read.
        uprighting: what tells the rolls; None for the true label maps.
    """
    truth = {dataset.root / row.path: math.radians(row.roll) for row in read_truth(dataset.root)}
    told: list[Tensor] = []
    true: list[float] = []
    cameras: list[Tensor] = []
    with torch.inference_mode():
        for split in (dataset.query, dataset.gallery):
            for batch in evaluation_loader(split, data):
                paths = [Path(path) for path in batch.paths]
                told.append(
                    axes_of_maps(dataset.root, paths)
                    if uprighting is None
                    else uprighting.direction(batch.images)
                )
                true += [truth[path] for path in paths]
                cameras.append(batch.cameras)
    direction, camera = torch.cat(told).double(), torch.cat(cameras).numpy()
    angle = torch.atan2(direction[:, 1], direction[:, 0]).numpy()
    views = {
        "aerial": camera <= 5,
        "aerial, tilted": (2 <= camera) & (camera <= 5),
        "aerial, from above": camera == 1,
        "ground": camera > 5,
    }
    found = roll_agreement({"image": angle}, np.asarray(true), views)
    Console().print(found.as_table())
    return found.matches


def axes_of_maps(root: Path, paths: Sequence[Path]) -> Tensor:
    """The directions that the true label maps of images tell, ``[B, 2]``, not normalised."""
    labels = torch.stack([group_labels(read_part_labels(root, path), 3) for path in paths])
    shares = functional.one_hot(labels.long(), 4).permute(0, 3, 1, 2).double()
    return body_axis(shares, labels.shape[2] / labels.shape[1])


def keep(path: Path, arguments: argparse.Namespace, matches: Sequence[RollMatch]) -> None:
    """Add a run's rows to a CSV, in the place of those that such a run has there.

    Raises:
        SystemExit: the file has other columns.
    """
    run = {name: str(getattr(arguments, name)) for name in ("reads", "steps", "people", "seed")}
    run["data"] = Path(arguments.data).name
    rows: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise SystemExit(f"{path}: wanted the columns {', '.join(COLUMNS)}")
            rows = [row for row in reader if any(row[name] != run[name] for name in run)]
    conditions = asdict(conditions_here(torch.device("cpu")))
    for match in matches:
        figures = {
            "view": match.view,
            "images": str(match.images),
            "correlation": f"{match.correlation:.3f}",
            "median_error_degrees": f"{match.error:.1f}",
            "within_90": f"{match.upright:.3f}",
        }
        rows.append(run | figures | {name: str(conditions[name]) for name in CONDITIONS})
    with atomic_write(path) as temporary, temporary.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
