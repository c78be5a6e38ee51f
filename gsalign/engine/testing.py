"""Embedding and evaluating whole splits on one process, or shared among several."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from gsalign.data import Batch, DataConfig, Split, evaluation_loader
from gsalign.data.synthetic import (
    BODY_PARTS,
    TRUTH_FILE,
    group_labels,
    has_part_labels,
    part_groups,
    read_part_labels,
    read_truth,
)
from gsalign.engine.angles import IMAGE, atan2_of
from gsalign.engine.distributed import gather_rows
from gsalign.errors import DataError
from gsalign.evaluation import (
    PROTOCOLS,
    EvaluationResult,
    Features,
    evaluate_features,
    extract_features,
)
from gsalign.evaluation.embedding import FlipTest
from gsalign.evaluation.part_agreement import PartAgreement, PartCounts
from gsalign.evaluation.roll_agreement import RollAgreement, roll_agreement
from gsalign.model import FeatureOutput, GSAlign

Report = Callable[[int, int], None]
"""Called with (images done, images in all) of this process."""

Truth = TypeVar("Truth")

AUTOCAST = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def embed_split(
    network: GSAlign,
    split: Split,
    config: DataConfig,
    accelerator: Accelerator,
    *,
    flip_test: FlipTest = "off",
    progress: Callable[[int], None] | None = None,
) -> Features:
    """Embed every image of a split; the processes share the work and all get all of the result.

    Args:
        network: unwrapped, on the accelerator's device; its mode stays.
        split: the images.
        config: image size, batch size, workers; ``on_broken`` decides about broken images.
        accelerator: of the run; its precision is used.
        flip_test: see ``gsalign.evaluation.embed_batch``.
        progress: called with the number of images this process has done.

    Raises:
        DataError: an image is broken and ``config.on_broken`` is ``"error"``, or an embedding is
            not finite.
    """
    rank, processes = accelerator.process_index, accelerator.num_processes
    device = accelerator.device
    as_bytes = device.type != "cpu"
    loader = evaluation_loader(split, config, rank=rank, world_size=processes, as_bytes=as_bytes)
    if len(loader) or processes == 1:
        mine = extract_features(
            network,
            _normalised(loader, device),
            device=device,
            flip_test=flip_test,
            autocast=AUTOCAST[accelerator.mixed_precision],
            progress=progress,
        )
        embeddings, indices = mine.embeddings, torch.from_numpy(mine.indices)
        visibility = mine.visibility
        if processes == 1:
            return replace(mine, lists=_lists(split, mine.indices))
    else:
        slots = (1 + network.config.parts,) if network.config.parts else ()
        embeddings = torch.empty(0, *slots, network.config.width)
        visibility = torch.empty(0, *slots) if slots else None
        indices = torch.empty(0, dtype=torch.int64)
    # Stretches are contiguous, so the rows of all processes, in order, are the split in order.
    embeddings = gather_rows(accelerator, embeddings)
    visibility = None if visibility is None else gather_rows(accelerator, visibility)
    places = gather_rows(accelerator, indices).numpy().astype(np.int64)
    return Features(
        embeddings=embeddings,
        identities=split.identities[places],
        cameras=split.cameras[places],
        views=split.views[places],
        indices=places,
        paths=tuple(str(split.records[place].path) for place in places.tolist()),
        visibility=visibility,
        lists=_lists(split, places),
    )


def _lists(split: Split, places: NDArray[np.int64]) -> dict[str, NDArray[np.bool_]]:
    return {name: listed[places] for name, listed in split.lists.items()}


def embed_splits(
    network: GSAlign,
    query: Split,
    gallery: Split,
    config: DataConfig,
    accelerator: Accelerator,
    *,
    flip_test: FlipTest = "off",
    report: Report | None = None,
) -> tuple[Features, Features]:
    """Features of a query and a gallery, on the accelerator's device, the same on every process.

    Args:
        network: unwrapped, on the accelerator's device; its mode stays.
        query: images that ask.
        gallery: images that are searched.
        config: how images are read.
        accelerator: of the run.
        flip_test: see ``gsalign.evaluation.embed_batch``.
        report: told of the progress over both splits.
    """
    shares = [-(-len(split) // accelerator.num_processes) for split in (query, gallery)]
    features = []
    for split, before in ((query, 0), (gallery, shares[0])):
        done = None if report is None else _offset(report, before, sum(shares))
        made = embed_split(network, split, config, accelerator, flip_test=flip_test, progress=done)
        features.append(made.to(accelerator.device))
    return features[0], features[1]


def _normalised(loader: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches on the device; bytes, a quarter of the way to there, are normalised there."""
    for batch in loader:
        there = replace(batch, images=batch.images.to(device, non_blocking=True))
        yield replace(there, images=there.pixels())


def evaluate_network(
    network: GSAlign,
    query: Split,
    gallery: Split,
    config: DataConfig,
    accelerator: Accelerator,
    *,
    protocols: tuple[str, ...] = tuple(PROTOCOLS),
    flip_test: FlipTest = "off",
    report: Report | None = None,
) -> dict[str, EvaluationResult]:
    """Results of a network by protocol name, the same on every process.

    Args:
        network: unwrapped, on the accelerator's device; its mode stays.
        query: images that ask.
        gallery: images that are searched.
        config: how images are read.
        accelerator: of the run.
        protocols: names, see ``gsalign.evaluation.KNOWN_PROTOCOLS``.
        flip_test: see ``gsalign.evaluation.embed_batch``.
        report: told of the progress over both splits.
    """
    features = embed_splits(
        network, query, gallery, config, accelerator, flip_test=flip_test, report=report
    )
    return evaluate_features(*features, protocols=protocols)


def _offset(report: Report, before: int, total: int) -> Callable[[int], None]:
    return lambda done: report(min(before + done, total), total)


@contextmanager
def looking(
    network: GSAlign, splits: Sequence[Split], config: DataConfig, accelerator: Accelerator
) -> Iterator[Iterator[tuple[Batch, FeatureOutput]]]:
    """A block in which a network, in evaluation mode, looks at every image of some splits.

    Gives the batches, each with what the network makes of it; every process sees all of them. No
    gradients are made in the block, and the network's mode is as before when it ends.

    Args:
        network: unwrapped, on the accelerator's device.
        splits: the images.
        config: how they are read.
        accelerator: of the run; its precision is used.
    """
    device = accelerator.device

    def look() -> Iterator[tuple[Batch, FeatureOutput]]:
        for split in splits:
            loader = evaluation_loader(split, config, as_bytes=device.type != "cpu")
            for batch in _normalised(loader, device):
                with accelerator.autocast():
                    seen = network.forward_features(batch.images)
                yield batch, seen

    was_training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            yield look()
    finally:
        network.train(was_training)


def measure_parts(
    network: GSAlign,
    splits: Sequence[Split],
    root: Path,
    config: DataConfig,
    accelerator: Accelerator,
    *,
    progress: Callable[[int], None] | None = None,
) -> PartAgreement | None:
    """Agreement of a network's part masks with the true parts of a generated set.

    The true parts are put into as many groups as the network has parts (``part_groups``; the parts
    themselves for six and more), and a group is as visible as its members are on average. Every
    process looks at all images.

    Args:
        network: unwrapped, on the accelerator's device; its mode stays.
        splits: the images, all below ``root``.
        root: folder of the set.
        config: how images are read.
        accelerator: of the run; its precision is used.
        progress: called with the number of images done.

    Returns:
        None where the network has no parts or the set no true label maps.

    Raises:
        DataError: the truth of an image is missing or damaged.
    """
    if network.parts is None or not has_part_labels(root) or not (root / TRUTH_FILE).is_file():
        return None
    shares = {root / row.path: row.visible for row in read_truth(root)}
    groups = part_groups(min(network.config.parts, len(BODY_PARTS)))
    counts = PartCounts(tuple(groups), network.config.parts)
    done = 0
    with looking(network, splits, config, accelerator) as batches:
        for batch, seen in batches:
            parts = seen.parts
            assert parts is not None
            paths = [Path(path) for path in batch.paths]
            labels = torch.stack(
                [group_labels(read_part_labels(root, path), len(groups)) for path in paths]
            )
            if network.uprighting is not None and seen.direction is not None:
                there = labels.to(seen.direction.device)
                labels = network.uprighting.turn_labels(there, seen.direction)
            counts.add(
                parts.masks.unflatten(2, network.config.mask_grid),
                labels.cpu(),
                parts.visibility,
                torch.tensor([_true_shares(shares, path, groups) for path in paths]),
            )
            done += len(paths)
            if progress is not None:
                progress(done)
    return counts.agreement()


def measure_rolls(
    network: GSAlign,
    splits: Sequence[Split],
    root: Path,
    config: DataConfig,
    accelerator: Accelerator,
    *,
    progress: Callable[[int], None] | None = None,
) -> RollAgreement | None:
    """Agreement of a network's angles with the true roll of a generated set.

    The angles are that of the image's turn, where the network has one, and of each LTPS. Every
    process looks at all images.

    Args:
        network: unwrapped, on the accelerator's device; its mode stays.
        splits: the images, all below ``root``.
        root: folder of the set.
        config: how images are read.
        accelerator: of the run; its precision is used.
        progress: called with the number of images done.

    Returns:
        None where the network turns nothing or the set has no truth.

    Raises:
        DataError: the truth of an image is missing or damaged.
    """
    layers = network.config.ltps_layers
    if not (layers or network.config.orientation.turns_images):
        return None
    if not (root / TRUTH_FILE).is_file():
        return None
    truth = {root / row.path: math.radians(row.roll) for row in read_truth(root)}
    collected: dict[str, list[Tensor]] = {}
    rolls: list[float] = []
    views: list[Tensor] = []
    with looking(network, splits, config, accelerator) as batches:
        for batch, seen in batches:
            if seen.direction is not None:
                collected.setdefault(IMAGE, []).append(atan2_of(seen.direction).cpu())
            for layer, angle in zip(layers, seen.angles, strict=True):
                collected.setdefault(f"layer {layer}", []).append(angle.float().cpu())
            rolls += [_true_of(truth, Path(path)) for path in batch.paths]
            views.append(batch.views)
            if progress is not None:
                progress(len(rolls))
    if not rolls:
        return None
    aerial = torch.cat(views).numpy() == 1
    return roll_agreement(
        {name: torch.cat(parts).double().numpy() for name, parts in collected.items()},
        np.asarray(rolls),
        {"aerial": aerial, "ground": ~aerial},
    )


def _true_shares(
    shares: Mapping[Path, Mapping[str, float]], path: Path, groups: Mapping[str, Sequence[str]]
) -> list[float]:
    """Visible share of every group: the mean over those of its parts that the person has."""
    share = _true_of(shares, path)
    had = [[share[part] for part in group if share[part] >= 0.0] for group in groups.values()]
    return [sum(each) / len(each) if each else 0.0 for each in had]


def _true_of(truth: Mapping[Path, Truth], path: Path) -> Truth:
    """What the set's table of truth says of an image."""
    if path not in truth:
        raise DataError(f"{path} is not in the set's table of truth; generate the set again")
    return truth[path]
