"""A tiny CARGO folder and the settings of a network small enough to train in a second."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

import numpy as np
from cargo_folder import write_split
from PIL import Image

from gsalign.data.synthetic import PARTS, UNKNOWN

# Everything a run takes from the command line or a file, as overrides.
TINY = (
    "device=cpu",
    "model.image_size=[32,16]",
    "model.patch_size=8",
    "model.width=24",
    "model.depth=2",
    "model.num_heads=2",
    "model.drop_path=0.1",
    "model.ltps.hidden=[8,4]",
    "data.identities_per_batch=3",
    "data.images_per_identity=2",
    "data.num_workers=0",
    "data.augmentation.crop_padding=2",
    "schedule.warmup=2",
    "schedule.step=iteration",
    "training.epochs=null",
    "training.iterations=4",
    "training.precision=no",
    "training.log_every=1",
    "training.evaluate_every=0",
    "training.checkpoint_every=2",
)


def write_people(root: Path) -> Path:
    """Write 6 training people in cameras 1 and 7, 4 test people in cameras 2, 3, 6 and 13."""
    write_split(root, "train", {i: {1: 2, 7: 2} for i in range(10, 70, 10)})
    write_split(root, "query", {i: {2: 1, 13: 1} for i in range(101, 105)}, start=500)
    write_split(root, "gallery", {i: {3: 1, 6: 1} for i in range(101, 105)}, start=600)
    return root


def write_part_labels(root: Path) -> Path:
    """Write label maps of the training images; of some images much is known, of others little."""
    for number, image in enumerate(sorted((root / "train").rglob("*.jpg"))):
        labels = np.random.default_rng(number).integers(0, len(PARTS), (12, 6), dtype=np.uint8)
        labels = labels.repeat(4, axis=0).repeat(4, axis=1)
        labels[:, : number % 24] = UNKNOWN
        path = root / "parts" / image.relative_to(root).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(labels).save(path)
    return root


def read_files(folder: Path) -> dict[str, bytes]:
    """Contents of all files below a folder, by their path in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
