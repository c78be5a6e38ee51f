"""Embeddings, and what is known of the images they are of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Features:
    """Embeddings and what is known of the images they are of.

    Attributes:
        embeddings: float32 ``[N, D]`` on the CPU; from a network with parts ``[N, 1 + P, C]``, the
            whole image and its parts.
        identities: raw identities, int64 ``[N]``.
        cameras: int64 ``[N]``.
        views: 0 ground and 1 aerial, int64 ``[N]``.
        indices: place of each image in its split, int64 ``[N]``.
        paths: the files.
        visibility: float32 ``[N, 1 + P]``, how visible each part is; None without parts.
        lists: which images are on the list of a protocol, bool ``[N]``, by the protocol's name.
    """

    embeddings: Tensor
    identities: NDArray[np.int64]
    cameras: NDArray[np.int64]
    views: NDArray[np.int64]
    indices: NDArray[np.int64]
    paths: tuple[str, ...]
    visibility: Tensor | None = None
    lists: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.paths)

    def take(self, places: NDArray[np.int64]) -> Features:
        """Return the features of some of the images, in the order of ``places``."""
        rows = torch.from_numpy(places).to(self.embeddings.device)
        return Features(
            embeddings=self.embeddings[rows],
            identities=self.identities[places],
            cameras=self.cameras[places],
            views=self.views[places],
            indices=self.indices[places],
            paths=tuple(self.paths[place] for place in places.tolist()),
            visibility=None if self.visibility is None else self.visibility[rows],
            lists={name: listed[places] for name, listed in self.lists.items()},
        )

    def to(self, device: torch.device | str) -> Features:
        """Return the features with their embeddings on ``device``, where they are compared."""
        visibility = None if self.visibility is None else self.visibility.to(device)
        return replace(self, embeddings=self.embeddings.to(device), visibility=visibility)
