"""Who asks whom: the protocols by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gsalign.data.records import AERIAL, GROUND
from gsalign.errors import ConfigError

Membership = tuple[NDArray[np.bool_], NDArray[np.bool_]]
"""Which queries and which gallery images are on a list."""


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
        listed: only images on the protocol's list take part; the data set has the list.
    """

    name: str
    title: str
    query_view: int | None
    gallery_view: int | None
    camera_is_view: bool
    description: str
    listed: bool = False

    def select(
        self,
        query_views: NDArray[np.int64],
        gallery_views: NDArray[np.int64],
        lists: Membership | None = None,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the places of the queries that ask and of the gallery images searched.

        Args:
            query_views: ``[Q]``.
            gallery_views: ``[G]``.
            lists: which queries ``[Q]`` and gallery images ``[G]`` are on the protocol's list.

        Raises:
            ConfigError: the protocol has a list, and it was not given.
        """
        if not self.listed:
            return _places(query_views, self.query_view), _places(gallery_views, self.gallery_view)
        if lists is None:
            raise ConfigError(
                f"protocol {self.name!r} needs the list of its images, which only the data set "
                f"it belongs to has; elsewhere use {', '.join(PROTOCOLS)}"
            )
        query, gallery = lists
        return (
            _places(query_views, self.query_view, query),
            _places(gallery_views, self.gallery_view, gallery),
        )

    @property
    def needs_views(self) -> bool:
        """Whether the protocol can only be evaluated when the views are known."""
        return self.camera_is_view or self.query_view is not None or self.gallery_view is not None


def _places(
    views: NDArray[np.int64], wanted: int | None, listed: NDArray[np.bool_] | None = None
) -> NDArray[np.int64]:
    chosen = np.ones(len(views), np.bool_) if wanted is None else views == wanted
    return np.flatnonzero(chosen if listed is None else chosen & listed).astype(np.int64)


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

# AG-ReID.v2's experiments.
_LISTED = (
    Protocol(
        "aerial-to-cctv",
        "A->C",
        AERIAL,
        GROUND,
        False,
        "Aerial queries ask the CCTV gallery, both as experiment 1 of AG-ReID.v2 lists them.",
        listed=True,
    ),
    Protocol(
        "aerial-to-wearable",
        "A->W",
        AERIAL,
        GROUND,
        False,
        "Aerial queries ask the gallery of the wearable camera (experiment 2).",
        listed=True,
    ),
    Protocol(
        "cctv-to-aerial",
        "C->A",
        GROUND,
        AERIAL,
        False,
        "CCTV queries ask the aerial gallery (experiment 4).",
        listed=True,
    ),
    Protocol(
        "wearable-to-aerial",
        "W->A",
        GROUND,
        AERIAL,
        False,
        "Queries of the wearable camera ask the aerial gallery (experiment 5).",
        listed=True,
    ),
)

# Those that any set with views can be evaluated by, and all there are.
PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in _ALL}
KNOWN_PROTOCOLS: dict[str, Protocol] = {p.name: p for p in (*_ALL, *_LISTED)}


def get_protocol(name: str | Protocol) -> Protocol:
    """Return the protocol of that name.

    Raises:
        ConfigError: there is none; the message lists those there are.
    """
    if isinstance(name, Protocol):
        return name
    if name not in KNOWN_PROTOCOLS:
        raise ConfigError(f"protocol {name!r} is unknown; there are {', '.join(KNOWN_PROTOCOLS)}")
    return KNOWN_PROTOCOLS[name]


def membership(
    protocol: Protocol,
    query: Mapping[str, NDArray[np.bool_]],
    gallery: Mapping[str, NDArray[np.bool_]],
) -> Membership | None:
    """What ``Protocol.select`` wants to know of the lists of a query and a gallery, by name."""
    if protocol.name not in query or protocol.name not in gallery:
        return None
    return query[protocol.name], gallery[protocol.name]


def validation_protocols(protocols: Sequence[str]) -> tuple[str, ...]:
    """The protocols of held-out training people: ``all``, and the test's that need no list."""
    others = (name for name in protocols if name != "all" and not KNOWN_PROTOCOLS[name].listed)
    return ("all", *others)


def protocol_title(name: str) -> str:
    """The name of a protocol in tables and pictures; of an unknown one the name itself."""
    return KNOWN_PROTOCOLS[name].title if name in KNOWN_PROTOCOLS else name
