"""What a network has to beat: chance, computed exactly, and a colour histogram."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from gsalign.data.images import ImageStore
from gsalign.data.records import Split
from gsalign.evaluation.features import Features
from gsalign.evaluation.figures import in_percent
from gsalign.evaluation.metrics import MAX_RANK
from gsalign.evaluation.protocols import Protocol, get_protocol, membership


@dataclass(frozen=True)
class ChanceLevel:
    """The expected figures of a gallery in random order. Shares are in 0 .. 1.

    Attributes:
        protocol: its name.
        cmc: expected CMC curve; NaN without valid queries.
        mAP: expected mean average precision.
        mINP: expected mean inverse negative penalty.
        num_queries: queries that the protocol asks.
        num_valid_queries: queries that have a positive.
        num_gallery: images in the gallery of the protocol.
    """

    protocol: str
    cmc: NDArray[np.float64]
    mAP: float
    mINP: float
    num_queries: int
    num_valid_queries: int
    num_gallery: int

    def as_dict(self) -> dict[str, float | int | None]:
        """Return the summary in percent, with the keys of ``EvaluationResult.as_dict``."""
        figures = {f"Rank-{k}": float(self.cmc[k - 1]) for k in (1, 5, 10)}
        figures |= {"mAP": self.mAP, "mINP": self.mINP}
        figures["metric"] = (self.mAP + figures["Rank-1"]) / 2
        summary = in_percent(figures)
        summary["queries"] = self.num_queries
        summary["valid_queries"] = self.num_valid_queries
        summary["gallery"] = self.num_gallery
        return summary


def chance_level(query: Split, gallery: Split, protocol: str | Protocol = "all") -> ChanceLevel:
    """Compute what random order would score, exactly, in expectation.

    With P positives among N gallery images in random order, the chance of a positive among the
    first k is 1 - C(N-P, k) / C(N, k); the expected AP is (H_N + (N - H_N) (P-1)/(N-1)) / N with
    the harmonic number H_N; the last positive is at rank m with chance C(m-1, P-1) / C(N, P).

    Args:
        query: the images that ask.
        gallery: the images searched.
        protocol: which of them, and what is left out.

    Raises:
        ConfigError: the protocol is unknown, or wants a list that the splits do not have.
    """
    chosen = get_protocol(protocol)
    lists = membership(chosen, query.lists, gallery.lists)
    rows, columns = chosen.select(query.views, gallery.views, lists)
    query_cameras = (query.views if chosen.camera_is_view else query.cameras)[rows]
    cameras = (gallery.views if chosen.camera_is_view else gallery.cameras)[columns]
    identities = gallery.identities[columns]
    cases: dict[tuple[int, int], int] = {}
    for identity, camera in zip(query.identities[rows], query_cameras, strict=True):
        same = identities == identity
        left_out = int((same & (cameras == camera)).sum())
        positives = int(same.sum()) - left_out
        if positives:
            case = positives, len(columns) - left_out
            cases[case] = cases.get(case, 0) + 1
    valid = sum(cases.values())
    cmc = np.zeros(MAX_RANK)
    ap = inp = 0.0
    for (positives, size), times in cases.items():
        expected = _expected(positives, size)
        cmc += times * expected[0]
        ap += times * expected[1]
        inp += times * expected[2]
    share = 1.0 / valid if valid else float("nan")
    return ChanceLevel(
        protocol=chosen.name,
        cmc=cmc * share,
        mAP=ap * share,
        mINP=inp * share,
        num_queries=len(rows),
        num_valid_queries=valid,
        num_gallery=len(columns),
    )


def _expected(positives: int, size: int) -> tuple[NDArray[np.float64], float, float]:
    """Return the expected CMC curve, AP and INP of one query."""
    drawn = np.arange(MAX_RANK, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        misses = np.where(
            drawn < size - positives, (size - positives - drawn) / (size - drawn), 0.0
        )
    cmc = np.subtract(1.0, np.cumprod(misses), dtype=np.float64)
    harmonic = float((1.0 / np.arange(1, size + 1)).sum())
    others = (positives - 1) / (size - 1) if size > 1 else 0.0
    ap = (harmonic + (size - harmonic) * others) / size
    # Chance that the last positive is at rank m, from m = size downwards.
    ranks = np.arange(size, positives - 1, -1, dtype=np.float64)
    ratios = (ranks[:-1] - positives) / (ranks[:-1] - 1.0)
    chances = positives / size * np.concatenate([[1.0], np.cumprod(ratios)])
    return cmc, float(ap), float((chances * positives / ranks).sum())


def histogram_features(
    split: Split, *, image_size: tuple[int, int] = (128, 64), stripes: int = 6, bins: int = 16
) -> Features:
    """Describe images by the colour histograms of their horizontal stripes.

    Each stripe gives one histogram per channel; shares are square-rooted, so that the cosine of
    two descriptions is their mean Bhattacharyya coefficient.

    Args:
        split: the images.
        image_size: (height, width) they are resized to.
        stripes: number of stripes.
        bins: bins per channel, over 0 .. 255.

    Returns:
        Features with ``stripes * 3 * bins`` numbers each, of length 1.

    Raises:
        DataError: an image cannot be read.
        ValueError: ``stripes`` is not in 1 .. height, or ``bins`` not in 1 .. 256.
    """
    if not 1 <= stripes <= image_size[0]:
        raise ValueError(f"stripes is {stripes}; it must be in 1..{image_size[0]}")
    if not 1 <= bins <= 256:
        raise ValueError(f"bins is {bins}; it must be in 1..256")
    store = ImageStore(split.paths, image_size)
    rows = np.arange(image_size[0]) * stripes // image_size[0]
    # Which histogram each pixel of each channel counts in, before its value is known.
    cell = rows[None, :, None] * 3 + np.arange(3)[:, None, None]
    features = np.empty((len(split), stripes * 3 * bins), dtype=np.float32)
    for i in range(len(split)):
        place = cell * bins + store[i].numpy().astype(np.int64) * bins // 256
        features[i] = np.sqrt(np.bincount(place.ravel(), minlength=features.shape[1]))
    return Features(
        embeddings=F.normalize(torch.from_numpy(features), dim=1),
        identities=split.identities,
        cameras=split.cameras,
        views=split.views,
        indices=np.arange(len(split), dtype=np.int64),
        paths=tuple(str(path) for path in split.paths),
        lists=split.lists,
    )
