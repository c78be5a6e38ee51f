"""Holding out training identities, so that the best checkpoint is not chosen on the test set."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gsalign.data.records import ImageRecord, ReIDDataset, Split
from gsalign.errors import DataError


def hold_out_identities(
    dataset: ReIDDataset, fraction: float, *, seed: int = 0
) -> tuple[ReIDDataset, Split, Split]:
    """Split some training identities off as a validation query and gallery.

    The first image of each held-out identity in each camera, in the order of the split, asks;
    its other images, and those it asks with too if a camera has no other, are searched. So every
    identity seen by two cameras gives valid queries.

    Args:
        dataset: the data set; query and gallery stay as they are.
        fraction: share of the training identities to hold out, in (0, 1); at least two are.
        seed: of the choice.

    Returns:
        The data set without the held-out images, the validation query, the validation gallery.

    Raises:
        DataError: the fraction is out of range, or leaves fewer than two identities on a side.
    """
    if not 0.0 < fraction < 1.0:
        raise DataError(f"validation fraction is {fraction}; it must lie between 0 and 1")
    identities = np.unique(dataset.train.identities)
    count = max(2, round(fraction * len(identities)))
    if len(identities) - count < 2:
        raise DataError(
            f"cannot hold out {count} of {len(identities)} training identities; "
            "use a smaller validation fraction or more identities"
        )
    chosen = np.random.default_rng(seed).choice(identities, count, replace=False)
    held = {int(identity) for identity in chosen}
    per_camera: dict[tuple[int, int], list[ImageRecord]] = {}
    for record in dataset.train.records:
        if record.identity in held:
            per_camera.setdefault((record.identity, record.camera), []).append(record)
    query = [records[0] for records in per_camera.values()]
    gallery = [record for records in per_camera.values() for record in records[1:] or records]
    train = dataset.train.select(lambda record: record.identity not in held)
    return (
        replace(dataset, train=train),
        Split("validation query", tuple(query)),
        Split("validation gallery", tuple(gallery)),
    )
