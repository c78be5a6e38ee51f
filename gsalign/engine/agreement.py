"""How a network's parts, angles and cut-out agree with the truth of a generated set."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from gsalign.data import DataConfig, Split
from gsalign.data.synthetic import (
    BODY_PARTS,
    TRUTH_FILE,
    group_labels,
    has_part_labels,
    part_groups,
    read_part_labels,
    read_truth,
)
from gsalign.data.synthetic.part_labels import PartLabelStore
from gsalign.engine.angles import IMAGE, atan2_of
from gsalign.engine.testing import looking
from gsalign.errors import DataError
from gsalign.evaluation.part_agreement import PartAgreement, PartCounts
from gsalign.evaluation.person_agreement import PersonAgreement, PersonCounts
from gsalign.evaluation.roll_agreement import RollAgreement, roll_agreement
from gsalign.model import GSAlign

Truth = TypeVar("Truth")


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
    if network.parts is None or not _has_true_parts(root):
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


def measure_cut_out(
    network: GSAlign,
    splits: Sequence[Split],
    root: Path,
    config: DataConfig,
    accelerator: Accelerator,
    *,
    progress: Callable[[int], None] | None = None,
) -> PersonAgreement | None:
    """Agreement of what a network cuts out with the true person of a generated set.

    The person is all body parts, the bag among them; what hides them is background. Pixels are
    those of the network's images before their turn. Every process looks at all images.

    Args:
        network: unwrapped, on the accelerator's device; its mode stays.
        splits: the images, all below ``root``.
        root: folder of the set.
        config: how images are read.
        accelerator: of the run; its precision is used.
        progress: called with the number of images done.

    Returns:
        None where the network cuts nothing out or the set has no true label maps.

    Raises:
        DataError: the label map of an image is missing or damaged.
    """
    if network.uprighting is None or not network.uprighting.cuts_out or not _has_true_parts(root):
        return None
    size = network.config.image_size
    counts = PersonCounts()
    done = 0
    with looking(network, splits, config, accelerator) as batches:
        for batch, seen in batches:
            assert seen.person is not None
            maps = PartLabelStore(root, [Path(path) for path in batch.paths], size, groups=1)
            labels = torch.stack([maps[image] for image in range(len(batch))])
            counts.add(seen.person, labels, batch.views)
            done += len(batch)
            if progress is not None:
                progress(done)
    return counts.agreement()


def _has_true_parts(root: Path) -> bool:
    """Whether a set has label maps, and they are the truth and not a teacher's."""
    return has_part_labels(root) and (root / TRUTH_FILE).is_file()


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
