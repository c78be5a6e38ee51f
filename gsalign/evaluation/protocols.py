"""Who asks whom: the CARGO protocols by name."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gsalign.data.records import AERIAL, GROUND
from gsalign.errors import ConfigError


@dataclass(frozen=True)
class Protocol:
    """Which queries ask which gallery, and what counts as the same camera.

    Attributes:
        name: its name in configurations and result files.
        title: its name in tables.
        query_view: only queries of this view ask; all if ``None``.
        gallery_view: only gallery images of this view are searched; all if ``None``.
        camera_is_view: take the view for the camera, so that positives are of the other view.
        description: one sentence.
    """

    name: str
    title: str
    query_view: int | None
    gallery_view: int | None
    camera_is_view: bool
    description: str

    def select(
        self, query_views: NDArray[np.int64], gallery_views: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the places of the queries that ask and of the gallery images searched."""
        return _places(query_views, self.query_view), _places(gallery_views, self.gallery_view)

    @property
    def needs_views(self) -> bool:
        """Whether the protocol can only be evaluated when the views are known."""
        return self.camera_is_view or self.query_view is not None or self.gallery_view is not None


def _places(views: NDArray[np.int64], wanted: int | None) -> NDArray[np.int64]:
    if wanted is None:
        return np.arange(len(views), dtype=np.int64)
    return np.flatnonzero(views == wanted).astype(np.int64)


_ALL = (
    Protocol("all", "ALL", None, None, False, "All queries ask the whole gallery."),
    Protocol(
        "ground-ground", "G<->G", GROUND, GROUND, False, "Ground queries ask the ground gallery."
    ),
    Protocol(
        "aerial-aerial", "A<->A", AERIAL, AERIAL, False, "Aerial queries ask the aerial gallery."
    ),
    Protocol(
        "aerial-ground-vdt",
        "A<->G (VDT)",
        None,
        None,
        True,
        "All queries ask the whole gallery; images of the query's identity and view are left out, "
        "those of other people in that view stay as distractors. VDT's form of A<->G.",
    ),
    Protocol(
        "aerial-to-ground",
        "A->G",
        AERIAL,
        GROUND,
        False,
        "Aerial queries ask the ground gallery only. The form of SeCap and ViSA.",
    ),
    Protocol(
        "ground-to-aerial",
        "G->A",
        GROUND,
        AERIAL,
        False,
        "Ground queries ask the aerial gallery only.",
    ),
)

PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in _ALL}


def get_protocol(name: str | Protocol) -> Protocol:
    """Return the protocol of that name.

    Raises:
        ConfigError: there is none; the message lists those there are.
    """
    if isinstance(name, Protocol):
        return name
    if name not in PROTOCOLS:
        raise ConfigError(f"protocol {name!r} is unknown; there are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
