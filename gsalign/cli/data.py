"""``gsalign data``: render a data set to learn on, check one, and label the parts in one."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsalign.cli.options import add_config_options, read_config

if TYPE_CHECKING:
    from rich.console import Console

    from gsalign.data import CountCheck, ReIDDataset

_NAMED_AT_MOST = 20


def add_parser(subparsers: Any) -> None:
    """Add the command and its subcommands."""
    parser = subparsers.add_parser("data", help="generate, check or label a data set")
    inner = parser.add_subparsers(dest="data_command", metavar="command", required=True)

    generate = inner.add_parser(
        "generate",
        help="render an aerial-ground data set",
        description="Renders people seen from drones and from the ground into a folder laid out "
        "like CARGO, with the truth beside the images. Settings are those of SyntheticConfig: "
        "train_identities=100 test_identities=50 images_per_identity_aerial=16 "
        "image_size=[128,64] night_share=0.3 seed=0 ... The same settings give the same images.",
    )
    generate.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    generate.add_argument(
        "--workers", type=int, metavar="N", help="processes (default: one per core)"
    )
    generate.add_argument("--overwrite", action="store_true", help="replace another generated set")
    generate.add_argument("overrides", nargs="*", metavar="key=value", help="settings")
    generate.set_defaults(run=run_generate)

    check = inner.add_parser(
        "check",
        help="count a data set and open every image",
        description="Prints the counts of every split, compares them with the published ones, and "
        "opens every image. Names images that are broken (unreadable, cut off, empty) or odd "
        "(tiny, CMYK, 16 bits, wrong suffix) and files whose names say nothing. Exit code 2 if "
        "training on the set would fail.",
    )
    check.add_argument(
        "root", metavar="PATH", help="folder of the data set, or a .csv or .tsv table"
    )
    check.add_argument(
        "--dataset",
        metavar="NAME",
        help="cargo, ag_reid, ag_reid_v2, market1501, folder or table (default: by the layout)",
    )
    check.add_argument("--fast", action="store_true", help="count only, open no image")
    check.set_defaults(run=run_check)

    label = inner.add_parser(
        "label",
        help="write body part label maps by a network that knows parts",
        description="Writes parts/ below the data set: for every training image the body parts "
        "that the network's part masks see, as grey PNG. Training with model.losses.part_labels "
        "then learns from them; see docs/parts.md.",
    )
    label.add_argument(
        "--checkpoint", required=True, metavar="FILE", help="weights of a run with parts"
    )
    label.add_argument(
        "--sure",
        type=float,
        default=0.6,
        metavar="SHARE",
        help="pixels whose largest mask is less are left unknown (default 0.6)",
    )
    label.add_argument("--overwrite", action="store_true", help="replace label maps")
    add_config_options(label)
    label.set_defaults(run=run_label)


def run_generate(arguments: argparse.Namespace) -> int:
    """Render, with a progress bar, and sum up."""
    from gsalign.cli.console import make_console, progress
    from gsalign.config import validate_section
    from gsalign.data.synthetic import SyntheticConfig, generate
    from gsalign.errors import ConfigError

    config = validate_section(SyntheticConfig, arguments.overrides)
    workers = arguments.workers
    if workers is not None and workers < 0:
        raise ConfigError(f"--workers is {workers}; wanted 0 (this process) or a number")
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        workers = cores if cores > 1 else 0
    console = make_console()
    with progress(console, "rendering", "images") as report:
        made = generate(
            arguments.out, config, workers=workers, progress=report, overwrite=arguments.overwrite
        )
    counts = (
        f"{made.images:,} images of {made.identities:,} identities: train {made.train_images:,}, "
        f"query {made.query_images:,}, gallery {made.gallery_images:,}"
    )
    if made.reused:
        console.print(f"{made.root} holds this set already: {counts}")
    else:
        speed = made.images / max(made.seconds, 1e-9)
        console.print(f"{made.root}: {counts}")
        console.print(f"rendered in {made.seconds:.1f} s, {speed:.0f} images/s")
    return 0


def run_label(arguments: argparse.Namespace) -> int:
    """Label every training image, with a progress bar."""
    from gsalign.cli.console import log_to, make_console, progress
    from gsalign.data import load_dataset
    from gsalign.engine.distributed import build_accelerator
    from gsalign.engine.kernels import chosen_kernels
    from gsalign.engine.part_teacher import write_part_labels
    from gsalign.errors import ConfigError
    from gsalign.model import load_model

    if not 0.0 <= arguments.sure <= 1.0:
        raise ConfigError(f"--sure is {arguments.sure}; wanted a share from 0 to 1")
    checkpoint = Path(arguments.checkpoint)
    config = read_config(arguments, fallback=checkpoint.parent / "config.yaml")
    console = make_console()
    log_to(console)
    network = load_model(checkpoint)
    data = config.data.model_copy(update={"image_size": network.config.image_size})
    dataset = load_dataset(data)
    accelerator = build_accelerator(device=config.device, precision=config.training.precision)
    network.to(accelerator.device)
    with chosen_kernels(config.kernels), progress(console, "labelling", "images") as report:
        count = write_part_labels(
            network,
            dataset.train,
            dataset.root,
            data,
            accelerator,
            sure=arguments.sure,
            overwrite=arguments.overwrite,
            progress=report,
        )
    console.print(f"{dataset.root / 'parts'}: {count:,} label maps by {checkpoint}")
    return 0


def run_check(arguments: argparse.Namespace) -> int:
    """Count, compare, open, report."""
    from gsalign.cli.console import log_to, make_console
    from gsalign.data import (
        DataConfig,
        compare_with_published,
        dataset_statistics,
        get_dataset_entry,
        guess_dataset,
        statistics_table,
    )
    from gsalign.data.layout import treat_singletons
    from gsalign.data.synthetic.writer import MARKER_FILE
    from gsalign.errors import DataError

    console = make_console()
    log_to(console)
    root = Path(arguments.root)
    entry = get_dataset_entry(arguments.dataset or guess_dataset(root))
    # Names are told, however many there are, and singletons counted like everybody.
    dataset = entry.load(root, singletons="keep", max_bad_names=sys.maxsize)
    title = f"{entry.layout.title} in {arguments.root}"
    console.print(statistics_table(dataset_statistics(dataset), title=title))
    for name, count in dataset.ignored.items():
        console.print(f"{name}: {count:,} more images take no part, by the rules of the set")
    if (dataset.root / MARKER_FILE).is_file():
        console.print("a generated set: there are no published counts to compare with")
    else:
        _compare(console, compare_with_published(dataset, entry.layout))
    _, note = treat_singletons(dataset.train, "drop")
    if note:
        console.print(f"warning: {note}")
    faults: list[str] = []
    allowed = DataConfig.model_fields["max_bad_names"].default
    if dataset.bad_names > allowed:
        faults.append(
            f"{dataset.bad_names} image names could not be used and training allows {allowed}; "
            f"rename them, or train with data.max_bad_names={dataset.bad_names}"
        )
    if not arguments.fast:
        faults += _open(console, dataset)
    if faults:
        raise DataError(". ".join(faults))
    return 0


def _open(console: Console, dataset: ReIDDataset) -> list[str]:
    """Open every image and tell what was found; returns why training would fail, if it would."""
    from gsalign.cli.console import progress
    from gsalign.data import check_images

    broken: list[str] = []
    odd: list[str] = []
    total = sum(len(split) for split in dataset.splits)
    before = 0
    with progress(console, "opening", "images") as report:
        for split in dataset.splits:
            found = check_images(split, progress=_from(before, total, report))
            broken += found.broken
            odd += found.odd
            before += len(split)
    for line in (*broken[:_NAMED_AT_MOST], *(f"odd: {line}" for line in odd[:_NAMED_AT_MOST])):
        console.print(line)
    for kind, lines in (("broken", broken), ("odd", odd)):
        if len(lines) > _NAMED_AT_MOST:
            console.print(f"and {len(lines) - _NAMED_AT_MOST} more {kind} images")
    if broken:
        return [
            f"{len(broken)} of {total} images cannot be read; replace them, or train with "
            "data.on_broken=skip"
        ]
    console.print(f"all {total:,} images can be read" + (f", {len(odd)} are odd" if odd else ""))
    return []


def _compare(console: Console, counts: CountCheck) -> None:
    """Tell how the counts of a set compare with the published ones."""
    for line in counts.known:
        console.print(f"known difference: {line}")
    for line in counts.differences:
        console.print(f"warning: {line}")
    if counts.differences:
        console.print(
            "warning: this is not the published set as a whole; results on it are not comparable "
            "with published ones"
        )
    elif counts.compared:
        console.print(f"the {counts.compared} published counts agree, or differ as is known")


def _from(
    before: int, total: int, report: Callable[[int, int], None]
) -> Callable[[int, int], None]:
    return lambda done, _: report(before + done, total)
