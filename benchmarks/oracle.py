"""A generated set aligned by its truth, as a perfect ``model.orientation`` would.

``python -m benchmarks.oracle --data data/study --turn --out data/study-turned``. What a network
gains from such images is what aligning without errors gives it; see docs/study.md.
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
from torch import Tensor

from gsalign.data import read_image
from gsalign.data.synthetic import TruthRow, group_labels, read_part_labels, read_truth
from gsalign.model.orientation import turn

# Above the generator's own, so that a second compression costs next to nothing.
QUALITY = 98
BATCH = 64
GREY = 127.5
"""0 once images are normalised."""


def main(argv: Sequence[str] | None = None) -> None:
    """Align every image; label maps are left out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.oracle", description=__doc__)
    parser.add_argument("--data", required=True, metavar="DIR", help="a generated set")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--turn", action="store_true", help="turn images by their true rolls")
    parser.add_argument(
        "--cut-out", action="store_true", help="make grey what label maps do not give the person"
    )
    arguments = parser.parse_args(argv)
    root, out = Path(arguments.data), Path(arguments.out)
    if not (arguments.turn or arguments.cut_out):
        parser.error("nothing to do: give --turn, --cut-out or both")
    if out.exists():
        parser.error(f"--out {out} exists; name a new folder")
    rows = read_truth(root)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            images = aligned(root, batch, turned=arguments.turn, cut_out=arguments.cut_out)
            for row, image in zip(batch, images, strict=True):
                path = temporary / row.path
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path, quality=QUALITY, subsampling=0)
        temporary.chmod(0o755)
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    done = " and ".join(
        what
        for what, asked in (("turned", arguments.turn), ("cut out", arguments.cut_out))
        if asked
    )
    print(f"{out}: {len(rows):,} images of {root}, {done}")


def aligned(
    root: Path, rows: Sequence[TruthRow], *, turned: bool, cut_out: bool
) -> list[Image.Image]:
    """Images of a set as they are aligned by what is true of them."""
    images = torch.stack([read_image(root / row.path) for row in rows]).float() - GREY
    if cut_out:
        images = images * torch.stack([_person(root, row) for row in rows]).unsqueeze(1)
    if turned:
        rolls = [math.radians(row.roll) for row in rows]
        direction = torch.tensor([[math.cos(roll), math.sin(roll)] for roll in rolls])
        images = turn(
            images,
            direction,
            aspect=images.shape[-1] / images.shape[-2],
            padding_mode="zeros" if cut_out else "border",
        )
    pixels = (images + GREY).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(image) for image in pixels.numpy()]


def _person(root: Path, row: TruthRow) -> Tensor:
    """1 where the person is seen, ``[H, W]``."""
    return (group_labels(read_part_labels(root, root / row.path), 1) == 1).float()


if __name__ == "__main__":
    main()
