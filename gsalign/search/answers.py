"""What a search gives back: answers with their hits, filters, and grouping by identity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gsalign.errors import ConfigError
from gsalign.search.table import VIEWS, ImageTable


@dataclass(frozen=True)
class Hit:
    """One image that was found.

    Attributes:
        id: its number in the index.
        distance: 1 - cosine of the embeddings, or their part distance; 0 to 2.
        path: the file.
        identity: its label, or empty.
        camera: its label, or empty.
        view: ``"aerial"``, ``"ground"`` or empty.
    """

    id: int
    distance: float
    path: str
    identity: str
    camera: str
    view: str


@dataclass(frozen=True)
class Filter:
    """Which images count.

    Attributes:
        view: only images of this view; empty: of any.
        cameras: only images of these cameras; empty: of any.
        other_than: no image of these cameras.

    Raises:
        ConfigError: the view is unknown.
    """

    view: str = ""
    cameras: Sequence[str] = ()
    other_than: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.view not in VIEWS:
            raise ConfigError(f"view is {self.view!r}; wanted aerial, ground or nothing")
        for name in ("cameras", "other_than"):
            if isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} is a text; wanted a list of texts, one per camera")

    def mask(self, images: ImageTable) -> NDArray[np.bool_] | None:
        """Which rows of a table count, ``[N]``; None: all."""
        if not (self.view or self.cameras or self.other_than):
            return None
        keep = np.ones(len(images), bool)
        if self.view:
            keep &= np.array([view == self.view for view in images.views], bool)
        if self.cameras:
            wanted = set(self.cameras)
            keep &= np.array([camera in wanted for camera in images.cameras], bool)
        if self.other_than:
            unwanted = set(self.other_than)
            keep &= np.array([camera not in unwanted for camera in images.cameras], bool)
        return keep


def best_of_each_identity(hits: Sequence[Hit], k: int) -> tuple[Hit, ...]:
    """The nearest image of each of the k nearest identities.

    Args:
        hits: the nearest first. An image without an identity stands for itself.
        k: how many.
    """
    best: dict[object, Hit] = {}
    for hit in hits:
        best.setdefault(hit.identity or hit.id, hit)
        if len(best) == k:
            break
    return tuple(best.values())
