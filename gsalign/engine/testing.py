"""Embedding and evaluating whole splits on one process, or shared among several."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from gsalign.data import DataConfig, Split, evaluation_loader
from gsalign.data.synthetic import (
    BODY_PARTS,
    TRUTH_FILE,
    has_part_labels,
    read_part_labels,
    read_truth,
)
from gsalign.engine.angles import IMAGE, atan2_of
from gsalign.engine.distributed import gather_rows
from gsalign.errors import DataError
from gsalign.evaluation import PROTOCOLS, EvaluationResult
from gsalign.evaluation.features import (
    Features,
    FlipTest,
    evaluate_features,
    extract_features,
)
from gsalign.evaluation.part_agreement import PartAgreement, PartCounts
from gsalign.evaluation.roll_agreement import RollAgreement, roll_agreement
from gsalign.model import GSAlign

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
        flip_test: see ``gsalign.evaluation.features.embed_batch``.
        progress: called with the number of images this process has done.

    Raises:
        DataError: an image is broken and ``config.on_broken`` is ``"error"``, or an embedding is
            not finite.
    """
    rank, processes = accelerator.process_index, accelerator.num_processes
    loader = evaluation_loader(split, config, rank=rank, world_size=processes)
    if len(loader) or processes == 1:
        mine = extract_features(
            network,
            loader,
            device=accelerator.device,
            flip_test=flip_test,
            autocast=AUTOCAST[accelerator.mixed_precision],
            progress=progress,
        )
        embeddings, indices = mine.embeddings, torch.from_numpy(mine.indices)
        visibility = mine.visibility
        if processes == 1:
            return mine
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
    )


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
        protocols: names, see ``gsalign.evaluation.PROTOCOLS``.
        flip_test: see ``gsalign.evaluation.features.embed_batch``.
        report: told of the progress over both splits.
    """
    shares = [-(-len(split) // accelerator.num_processes) for split in (query, gallery)]
    features = []
    for split, before in ((query, 0), (gallery, shares[0])):
        done = None if report is None else _offset(report, before, sum(shares))
        features.append(
            embed_split(network, split, config, accelerator, flip_test=flip_test, progress=done)
        )
    return evaluate_features(*features, protocols=protocols)


def _offset(report: Report, before: int, total: int) -> Callable[[int], None]:
    return lambda done: report(min(before + done, total), total)


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

    Every process looks at all images.

    Args:
        network: unwrapped, on the accelerator's device; its mode stays.
        splits: the images, all below ``root``.
        root: folder of the set.
        config: how images are read.
        accelerator: of the run; its precision is used.
        progress: called with the number of images done.

    Returns:
        None where the network has no parts or the set no label maps.

    Raises:
        DataError: the truth of an image is missing or damaged.
    """
    if network.parts is None or not has_part_labels(root):
        return None
    shares = {root / row.path: row.visible for row in read_truth(root)}
    counts = PartCounts(BODY_PARTS, network.config.parts)
    was_training = network.training
    network.eval()
    done = 0
    try:
        with torch.inference_mode():
            for split in splits:
                for batch in evaluation_loader(split, config):
                    with accelerator.autocast():
                        seen = network.forward_features(batch.images.to(accelerator.device))
                    parts = seen.parts
                    assert parts is not None
                    paths = [Path(path) for path in batch.paths]
                    labels = torch.stack([read_part_labels(root, path) for path in paths])
                    counts.add(
                        parts.masks.unflatten(2, network.config.grid),
                        _as_seen(labels, network, seen.direction),
                        parts.visibility,
                        torch.tensor([_true_shares(shares, path) for path in paths]),
                    )
                    done += len(paths)
                    if progress is not None:
                        progress(done)
    finally:
        network.train(was_training)
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
    layers = list(network.backbone.ltps)
    if not (layers or network.uprighting) or not (root / TRUTH_FILE).is_file():
        return None
    truth = {root / row.path: math.radians(row.roll) for row in read_truth(root)}
    collected: dict[str, list[Tensor]] = {}
    rolls: list[float] = []
    views: list[Tensor] = []
    was_training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            for split in splits:
                for batch in evaluation_loader(split, config):
                    with accelerator.autocast():
                        seen = network.forward_features(batch.images.to(accelerator.device))
                    if seen.direction is not None:
                        collected.setdefault(IMAGE, []).append(atan2_of(seen.direction).cpu())
                    for layer, angle in zip(layers, seen.angles, strict=True):
                        collected.setdefault(f"layer {layer}", []).append(angle.float().cpu())
                    rolls += [_true_of(truth, Path(path)) for path in batch.paths]
                    views.append(batch.views)
                    if progress is not None:
                        progress(len(rolls))
    finally:
        network.train(was_training)
    if not rolls:
        return None
    aerial = torch.cat(views).numpy() == 1
    return roll_agreement(
        {name: torch.cat(parts).double().numpy() for name, parts in collected.items()},
        np.asarray(rolls),
        {"aerial": aerial, "ground": ~aerial},
    )


def _as_seen(labels: Tensor, network: GSAlign, direction: Tensor | None) -> Tensor:
    """Label maps ``[B, H, W]`` turned as the network turned their images."""
    if network.uprighting is None or direction is None:
        return labels
    maps = labels.unsqueeze(1).float()
    return network.uprighting.turn(maps, direction.cpu().float(), mode="nearest").squeeze(1)


def _true_shares(shares: Mapping[Path, Mapping[str, float]], path: Path) -> list[float]:
    """Visible share of every body part; a part that the person does not have shows nothing."""
    true = _true_of(shares, path)
    return [max(true[part], 0.0) for part in BODY_PARTS]


def _true_of(truth: Mapping[Path, Truth], path: Path) -> Truth:
    """What the set's table of truth says of an image."""
    if path not in truth:
        raise DataError(f"{path} is not in the set's table of truth; generate the set again")
    return truth[path]
