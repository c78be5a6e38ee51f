"""Label maps by a network that knows body parts, for data sets where nobody drew any."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torch.nn import functional

from gsalign.data import DataConfig, Split
from gsalign.data.synthetic import PARTS, UNKNOWN, part_groups
from gsalign.data.synthetic.part_labels import PARTS_FOLDER, part_label_path_of
from gsalign.data.synthetic.writer import MARKER_FILE
from gsalign.engine.testing import looking
from gsalign.errors import ConfigError, DataError
from gsalign.model import GSAlign


def write_part_labels(
    network: GSAlign,
    split: Split,
    root: Path,
    config: DataConfig,
    accelerator: Accelerator,
    *,
    sure: float = 0.6,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the label maps that a network's part masks make of the images of a split.

    The maps lie under ``parts/``, where training looks for them: grey PNG of the network's image
    size, whose values are indices into ``PARTS``. A group of parts is written as its first part, so
    that a network of as many parts reads the same groups. They appear all at once, at the end.

    Args:
        network: the teacher, on the accelerator's device; its mode stays.
        split: the images, all below ``root``.
        root: folder of the set.
        config: how images are read.
        accelerator: of one process; its precision is used.
        sure: a pixel whose largest mask is less is ``UNKNOWN``.
        overwrite: replace maps that are there.
        progress: called with (images done, images in all).

    Returns:
        The number of maps.

    Raises:
        ConfigError: the network has no parts, or a number of which there are no groups.
        DataError: the set was generated, so that its maps are the truth; it has maps and
            ``overwrite`` is false; an image is broken, or all are, or is not below ``root``; or the
            maps cannot be written.
    """
    _check(network, root, overwrite)
    for record in split.records:
        part_label_path_of(root, record.path)  # now, and not after hours
    first = [group[0] for group in part_groups(network.config.parts).values()]
    values = torch.tensor([0, *map(PARTS.index, first)], dtype=torch.uint8)
    try:
        temporary = Path(tempfile.mkdtemp(dir=root, prefix=f".{PARTS_FOLDER}.labelling-"))
    except OSError as error:
        raise DataError(f"root {root} cannot be written: {error}") from error
    done = 0
    try:
        with looking(network, [split], config, accelerator) as batches:
            for batch, seen in batches:
                parts = seen.parts
                assert parts is not None
                masks = parts.masks.unflatten(2, network.config.mask_grid)
                labels = _labels(masks, network.config.image_size, values, sure)
                if network.uprighting is not None and seen.direction is not None:
                    # The masks are of the turned images, the maps of the images as they are.
                    direction = seen.direction.cpu()
                    labels = network.uprighting.turn_labels_back(labels, direction, UNKNOWN)
                for path, label_map in zip(batch.paths, labels, strict=True):
                    file = temporary / part_label_path_of(root, Path(path))
                    file.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(label_map.numpy()).save(file)
                done += len(batch)
                if progress is not None:
                    progress(done, len(split))
        if not done:
            raise DataError(f"no image of {split.name} could be read, so there is none to label")
        _put(temporary / PARTS_FOLDER, root / PARTS_FOLDER)
    except OSError as error:
        raise DataError(f"root {root} cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return done


def _check(network: GSAlign, root: Path, overwrite: bool) -> None:
    if network.parts is None:
        raise ConfigError(
            "the network has no parts (model.parts 0), so it cannot label any: take a checkpoint "
            "of a run with parts and label maps"
        )
    part_groups(network.config.parts)
    if (root / MARKER_FILE).is_file():
        raise DataError(
            f"root {root} was generated: its label maps are the truth (write_parts=true), and no "
            "network's are better"
        )
    if (root / PARTS_FOLDER).exists() and not overwrite:
        raise DataError(
            f"root {root} has label maps in {PARTS_FOLDER}/ already; --overwrite replaces them"
        )


def _labels(masks: Tensor, size: tuple[int, int], values: Tensor, sure: float) -> Tensor:
    """Masks ``[B, P + 1, rows, columns]`` as label maps ``[B, H, W]``, uint8 on the CPU."""
    smooth = functional.interpolate(masks.float(), size=size, mode="bilinear", align_corners=False)
    largest, winner = smooth.cpu().max(dim=1)
    return torch.where(largest < sure, torch.tensor(UNKNOWN, dtype=torch.uint8), values[winner])


def _put(made: Path, place: Path) -> None:
    """Move the maps to their place; older ones go with the temporary folder."""
    old = made.with_name("old")
    if place.exists():
        os.replace(place, old)
    try:
        os.replace(made, place)
    except BaseException:
        if old.exists():
            os.replace(old, place)
        raise
