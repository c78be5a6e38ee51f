"""Comparing a copy of a data set with the counts its makers published."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gsalign.data.layout import Layout, Published
from gsalign.data.records import VIEW_NAMES, ReIDDataset, Split

_SPLITS = {
    "train": ("train",),
    "query": ("query",),
    "gallery": ("gallery",),
    "test": ("query", "gallery"),
    "all": ("train", "query", "gallery"),
}


@dataclass(frozen=True)
class CountCheck:
    """What the comparison found.

    Attributes:
        compared: how many published counts there were to compare with.
        differences: one line per subset with another count that is not known.
        known: one line per subset with another count that is known from other copies.
    """

    compared: int
    differences: tuple[str, ...]
    known: tuple[str, ...]


def compare_with_published(dataset: ReIDDataset, layout: Layout) -> CountCheck:
    """Compare the counts of a data set with the published ones.

    Args:
        dataset: read with ``singletons="keep"``, so that nothing has been left out of it.
        layout: of the set.
    """
    compared = 0
    differences: list[str] = []
    known: list[str] = []
    for published in layout.published:
        images, identities = _count(dataset, published)
        told: list[str] = []
        excuse = ""
        for what, found, wanted in (
            ("images", images, published.images),
            ("identities", identities, published.identities),
        ):
            if wanted is None:
                continue
            compared += 1
            if found != wanted:
                told.append(f"{found:,} {what}, published {wanted:,} ({found - wanted:+,})")
                excuse = published.known.get(found, "") if what == "images" else ""
        if told:
            view = "" if published.view is None else f" ({VIEW_NAMES[published.view]})"
            line = f"{published.subset}{view}: {'; '.join(told)}"
            if excuse:
                known.append(f"{line}: {excuse}")
            else:
                differences.append(line)
    return CountCheck(compared, tuple(differences), tuple(known))


def _count(dataset: ReIDDataset, published: Published) -> tuple[int, int]:
    """Images, those ignored by the set's own rules among them, and identities of a subset."""
    images = 0
    people: list[NDArray[np.int64]] = []
    for name in _SPLITS[published.subset]:
        split: Split = getattr(dataset, name)
        chosen = slice(None) if published.view is None else split.views == published.view
        found = split.identities[chosen]
        images += len(found)
        if published.view is None:
            images += dataset.ignored.get(name, 0)
        people.append(found[found >= 0])
    return images, int(np.unique(np.concatenate(people)).size)
