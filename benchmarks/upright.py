"""A generated set turned upright by its true rolls, as a perfect ``model.orientation`` would.

``python -m benchmarks.upright --data data/study --out data/study-turned``. What a network gains
from such images is the most that any predictor of the roll can give it; see docs/study.md.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from gsalign.data import read_image
from gsalign.data.synthetic import read_truth
from gsalign.model.orientation import turn

# Above the generator's own, so that a second compression costs next to nothing.
QUALITY = 98
BATCH = 64


def main(argv: Sequence[str] | None = None) -> None:
    """Turn every image; label maps are left out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.upright", description=__doc__)
    parser.add_argument("--data", required=True, metavar="DIR", help="a generated set")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    arguments = parser.parse_args(argv)
    root, out = Path(arguments.data), Path(arguments.out)
    if out.exists():
        parser.error(f"--out {out} exists; name a new folder")
    rows = read_truth(root)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            turned = _turn(
                [root / row.path for row in batch], [math.radians(row.roll) for row in batch]
            )
            for row, image in zip(batch, turned, strict=True):
                path = temporary / row.path
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path, quality=QUALITY, subsampling=0)
        temporary.chmod(0o755)
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{out}: {len(rows):,} images of {root}, turned upright")


def _turn(paths: Sequence[Path], rolls: Sequence[float]) -> list[Image.Image]:
    images = torch.stack([read_image(path) for path in paths]).float()
    direction = torch.tensor([[math.cos(roll), math.sin(roll)] for roll in rolls])
    turned = turn(images, direction, aspect=images.shape[-1] / images.shape[-2])
    pixels = turned.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(image) for image in pixels.numpy()]


if __name__ == "__main__":
    main()
