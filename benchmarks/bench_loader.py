"""``python -m benchmarks.bench_loader``: images a second that reach a training loop.

Photographs are made up (noise over gradients, JPEG at quality 90, about the size of CARGO's), so
that nothing is downloaded; ``--data-root`` takes a CARGO folder instead. Each row is a loader of
its own: where images are kept, where they are augmented, how many workers. Workers are started and
the page cache is filled before the clock runs.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from gsalign.data import AugmentationConfig, DataConfig, TrainTransform, load_cargo, train_loader
from gsalign.data.decoding import read_image, resize
from gsalign.data.samplers import draws_of
from gsalign.provenance import device_name

PEOPLE = 48
IMAGES = 8


def write_people(root: Path) -> None:
    """A folder in CARGO's layout: 48 people, 8 training images each, from 130x50 to 380x160."""
    random = np.random.default_rng(0)
    for split, count in (("train", IMAGES), ("query", 1), ("gallery", 1)):
        for person in range(PEOPLE):
            for number in range(count):
                camera = 1 + 6 * (number % 2)
                folder = root / split / f"Cam{camera}"
                folder.mkdir(parents=True, exist_ok=True)
                height, width = int(random.integers(130, 380)), int(random.integers(50, 160))
                shade = np.linspace(40, 200, height)[:, None, None] * random.uniform(0.5, 1.2, 3)
                pixels = shade + random.normal(0, 12, (height, width, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
                    folder / f"Cam{camera}_day_{person}_{number}.jpg", quality=90
                )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.bench_loader", description=__doc__)
    made.add_argument("--data-root", type=Path, help="a CARGO folder, in place of made-up images")
    made.add_argument(
        "--workers", type=int, nargs="+", default=[0, len(os.sched_getaffinity(0))], metavar="N"
    )
    made.add_argument("--seconds", type=float, default=3.0, help="for each row")
    return made


def rate_of_loader(config: DataConfig, seconds: float) -> float:
    """Images a second of a training loader, after one batch for each worker and one more."""
    split = load_cargo(config.root).train
    loader = train_loader(split, config, iterations=(0, 10**6))
    batches = iter(loader)
    for _ in range(config.num_workers + 1):
        next(batches)
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        count += len(next(batches))
    return count / (time.perf_counter() - begin)


def rates_of_parts(root: Path, seconds: float) -> dict[str, float]:
    """Images a second of one thread: decoding and resizing; each set of augmentations."""
    paths = load_cargo(root).train.paths[:128]
    size = (256, 128)
    batch = torch.stack([resize(read_image(path), size) for path in paths])
    draws = draws_of(range(len(batch)))

    def measured(function: object, images: int) -> float:
        done, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            function()  # type: ignore[operator]
            done += images
        return done / (time.perf_counter() - begin)

    rates = {
        "decode and resize": measured(
            lambda: [resize(read_image(path), size) for path in paths], len(paths)
        )
    }
    for name in ("cargo", "ag_reid", "light", "none"):
        transform = TrainTransform(getattr(AugmentationConfig, name)())
        rates[f"augment, {name}"] = measured(lambda t=transform: t(batch, draws), len(batch))
    transform = TrainTransform(AugmentationConfig.cargo())
    rates["draw only, cargo"] = measured(lambda: transform.plan(draws, size), len(batch))
    return rates


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    options = parser().parse_args(arguments)
    console = Console()
    table = Table(title=f"{device_name(torch.device('cpu'))}, 256 x 128", title_justify="left")
    for name in ("what", "cache", "augmented", "workers", "images/s"):
        table.add_column(name, justify="right" if name in ("workers", "images/s") else "left")
    with tempfile.TemporaryDirectory() as folder:
        root = options.data_root or Path(folder) / "people"
        if options.data_root is None:
            write_people(root)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for name, rate in rates_of_parts(root, options.seconds).items():
            table.add_row(name, "", "", "one thread", f"{rate:.0f}")
        torch.set_num_threads(threads)
        table.add_section()
        for cache in ("none", "packed"):
            for on_device in (False, True):
                for workers in options.workers:
                    config = DataConfig(
                        root=root,
                        num_workers=workers,
                        cache=cache,
                        cache_folder=Path(folder) / "packed",
                        augment_on_device=on_device,
                    )
                    rate = rate_of_loader(config, options.seconds)
                    where = "on the device" if on_device else "by the loader"
                    table.add_row("training loader", cache, where, str(workers), f"{rate:.0f}")
    console.print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
