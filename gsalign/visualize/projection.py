"""Embeddings in two dimensions: t-SNE by scikit-learn, or the first two principal components."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from gsalign.extras import MissingExtraError, import_extra

logger = logging.getLogger(__name__)

Method = Literal["tsne", "pca"]
METHODS: tuple[Method, ...] = ("tsne", "pca")
PERPLEXITY = 30.0


@dataclass(frozen=True)
class Projection:
    """Where embeddings lie on paper.

    Attributes:
        points: float64 ``[N, 2]``.
        name: how they came there, for people.
        axes: what the two directions are; empty where they mean nothing, as in t-SNE.
    """

    points: NDArray[np.float64]
    name: str
    axes: tuple[str, ...] = ()


def project(vectors: Tensor, *, method: Method | None = None, seed: int = 0) -> Projection:
    """Project unit vectors so that what is near by cosine distance stays near.

    Args:
        vectors: ``[N, D]``, N of at least 3; lengths do not count.
        method: ``"tsne"``, ``"pca"``, or None for t-SNE where scikit-learn is installed and else
            principal components, which the log then tells.
        seed: of t-SNE; the same seed and versions give the same points.

    Raises:
        ValueError: there are fewer than 3 vectors, or the method is unknown.
        MissingExtraError: t-SNE was asked for by name and scikit-learn is not installed.
    """
    if vectors.dim() != 2 or len(vectors) < 3:
        raise ValueError(f"vectors must be [N, D] with N of at least 3, got {list(vectors.shape)}")
    if method not in (None, *METHODS):
        raise ValueError(f"method is {method!r}; wanted one of {', '.join(METHODS)}")
    unit = functional.normalize(vectors.detach().cpu().double(), dim=1)
    if method == "pca":
        return _principal_components(unit)
    try:
        return _tsne(unit, seed)
    except MissingExtraError as error:
        if method is not None:
            raise
        logger.info("principal components instead of t-SNE: %s", error)
        return _principal_components(unit)


def _tsne(unit: Tensor, seed: int) -> Projection:
    manifold = import_extra("sklearn.manifold", extra="visualize")
    # A third of the images at most: every one of them is to have neighbours that are not.
    perplexity = min(PERPLEXITY, (len(unit) - 1) / 3)
    tsne = manifold.TSNE(
        2, perplexity=perplexity, metric="cosine", init="pca", random_state=seed, n_jobs=1
    )
    points = tsne.fit_transform(unit.numpy()).astype(np.float64)
    return Projection(points, f"t-SNE, perplexity {perplexity:.3g}, cosine distance")


def _principal_components(unit: Tensor) -> Projection:
    centred = unit - unit.mean(dim=0)
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    points = centred @ directions[:2].T
    if points.shape[1] < 2:
        points = functional.pad(points, (0, 1))
    # A direction and its opposite are equally principal; the farthest point decides.
    farthest = points.gather(0, points.abs().argmax(dim=0, keepdim=True))
    points = points * torch.where(farthest < 0, -1.0, 1.0)
    shares = (values.square() / values.square().sum().clamp_min(1e-300))[:2]
    return Projection(
        points.numpy(),
        "principal components of the unit vectors",
        tuple(
            f"component {place} ({share:.0%} of the variance)"
            for place, share in enumerate(shares.tolist(), 1)
        ),
    )
