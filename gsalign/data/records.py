"""What a re-identification data set is made of: image records, splits, the three-split data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

GROUND = 0
AERIAL = 1
VIEW_NAMES = {GROUND: "ground", AERIAL: "aerial"}

# The protocols of a set whose every image has a view: CARGO's, and those of any set like it.
VIEW_PROTOCOLS = (
    "all",
    "ground-ground",
    "aerial-aerial",
    "aerial-ground-vdt",
    "aerial-to-ground",
    "ground-to-aerial",
)


@dataclass(frozen=True)
class ImageRecord:
    """One image and what its name says about it.

    Attributes:
        path: the image file.
        identity: the person, numbered as in the file name (not a contiguous label); -1 where
            nobody knows.
        camera: the camera, numbered as in the file name; a negative number of its own where it is
            not known, so that it is no other image's camera.
        view: ``GROUND`` (0) or ``AERIAL`` (1).
        time: ``"day"`` or ``"night"``; empty where the data set does not say.
        index: the running number of the image in its file name; -1 where there is none.
        identity_text: the identity where it is a text; empty where it is the number.
        camera_text: likewise the camera.
        lists: the protocols whose list names the image, in a set that has such lists.
    """

    path: Path
    identity: int
    camera: int
    view: int
    time: str = ""
    index: int = -1
    identity_text: str = ""
    camera_text: str = ""
    lists: tuple[str, ...] = ()

    @property
    def identity_name(self) -> str:
        """The identity as its owner writes it; empty if it is not known."""
        return self.identity_text or ("" if self.identity < 0 else str(self.identity))

    @property
    def camera_name(self) -> str:
        """The camera as its owner writes it; empty if it is not known."""
        return self.camera_text or ("" if self.camera < 0 else str(self.camera))


@dataclass(frozen=True)
class Split:
    """A named, ordered list of images; the arrays below follow that order.

    Attributes:
        name: ``"train"``, ``"query"``, ``"gallery"`` or a name of the caller's.
        records: the images.
    """

    name: str
    records: tuple[ImageRecord, ...]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.records)

    def _column(self, values: Iterable[int]) -> NDArray[np.int64]:
        column = np.fromiter(values, dtype=np.int64, count=len(self.records))
        # The arrays are cached and shared, so nobody may write to them.
        column.flags.writeable = False
        return column

    @cached_property
    def identities(self) -> NDArray[np.int64]:
        """Raw identity of every image, int64 ``[N]``."""
        return self._column(record.identity for record in self.records)

    @cached_property
    def cameras(self) -> NDArray[np.int64]:
        """Camera of every image, int64 ``[N]``."""
        return self._column(record.camera for record in self.records)

    @cached_property
    def views(self) -> NDArray[np.int64]:
        """View of every image, 0 ground and 1 aerial, int64 ``[N]``."""
        return self._column(record.view for record in self.records)

    @property
    def paths(self) -> tuple[Path, ...]:
        """File of every image."""
        return tuple(record.path for record in self.records)

    @property
    def num_images(self) -> int:
        """Number of images."""
        return len(self.records)

    @property
    def num_identities(self) -> int:
        """Number of different identities; images of nobody known count as none."""
        return int(np.unique(self.identities[self.identities >= 0]).size)

    @property
    def num_cameras(self) -> int:
        """Number of different cameras, as far as they are known."""
        return int(np.unique(self.cameras[self.cameras >= 0]).size)

    @cached_property
    def lists(self) -> Mapping[str, NDArray[np.bool_]]:
        """Which images are on the list of a protocol, bool ``[N]``, by the protocol's name."""
        names = sorted({name for record in self.records for name in record.lists})
        return {
            name: np.array([name in record.lists for record in self.records], dtype=np.bool_)
            for name in names
        }

    def select(self, keep: Callable[[ImageRecord], bool], name: str | None = None) -> Split:
        """Return the images for which ``keep`` is true, in the same order.

        Args:
            keep: decides image by image.
            name: the name of the new split; the old one when ``None``.
        """
        return Split(name or self.name, tuple(record for record in self.records if keep(record)))


@dataclass(frozen=True)
class ReIDDataset:
    """Training images, and the query and gallery images of the test.

    Attributes:
        name: the data set, for tables.
        root: the folder it was read from.
        train: images of the training identities.
        query: test images that ask.
        gallery: test images that are searched.
        notes: what the reader had to say about the folder (names left out, identities dropped);
            each is one line.
        protocols: names of the protocols the set is evaluated by, see
            ``gsalign.evaluation.protocols``.
        ignored: by split, the images that are there and take no part by the set's own rules, as
            the junk of Market-1501.
        bad_names: how many images were left out because of their names.
    """

    name: str
    root: Path
    train: Split
    query: Split
    gallery: Split
    notes: tuple[str, ...] = field(default=())
    protocols: tuple[str, ...] = VIEW_PROTOCOLS
    ignored: Mapping[str, int] = field(default_factory=dict)
    bad_names: int = 0

    @property
    def splits(self) -> tuple[Split, Split, Split]:
        """The three splits in the order train, query, gallery."""
        return self.train, self.query, self.gallery


def contiguous_labels(
    identities: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number the identities 0 .. N-1, in the order of their raw numbers.

    Args:
        identities: raw identities, int64 ``[M]``.

    Returns:
        ``labels [M]`` and ``classes [N]``, both int64, with ``classes[labels] == identities``.
    """
    classes, labels = np.unique(np.asarray(identities, dtype=np.int64), return_inverse=True)
    return labels.astype(np.int64).reshape(-1), classes
