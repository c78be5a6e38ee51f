"""The table of a data set: images, identities and cameras of every split."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from gsalign.data.records import AERIAL, GROUND, ReIDDataset, Split
from gsalign.tables import plain_table


@dataclass(frozen=True)
class SplitStatistics:
    """Counts of one split."""

    subset: str
    identities: int
    images: int
    cameras: int
    ground_images: int
    aerial_images: int
    night_images: int
    fewest_per_identity: int
    most_per_identity: int


def split_statistics(split: Split) -> SplitStatistics:
    """Count one split; an empty one gives zeros."""
    per_identity = np.unique(split.identities, return_counts=True)[1]
    return SplitStatistics(
        subset=split.name,
        identities=split.num_identities,
        images=split.num_images,
        cameras=split.num_cameras,
        ground_images=int((split.views == GROUND).sum()),
        aerial_images=int((split.views == AERIAL).sum()),
        night_images=sum(record.time == "night" for record in split.records),
        fewest_per_identity=int(per_identity.min()) if per_identity.size else 0,
        most_per_identity=int(per_identity.max(initial=0)),
    )


def dataset_statistics(dataset: ReIDDataset) -> list[SplitStatistics]:
    """Count the three splits of a data set."""
    return [split_statistics(split) for split in dataset.splits]


def statistics_table(rows: Iterable[SplitStatistics], title: str = "") -> Table:
    """Lay the counts out as a rich table: subset, # ids, # images, # cameras and what they hold."""
    counted = ("# ids", "# images", "# cameras", "# ground", "# aerial", "# night", "per id")
    table = plain_table(title, ["subset"], counted)
    for row in rows:
        counts = (
            row.identities,
            row.images,
            row.cameras,
            row.ground_images,
            row.aerial_images,
            row.night_images,
        )
        table.add_row(
            row.subset,
            *(f"{count:,}" for count in counts),
            f"{row.fewest_per_identity}-{row.most_per_identity}",
        )
    return table
