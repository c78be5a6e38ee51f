"""Do part masks mean parts? Predicted masks and visibilities against the truth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from gsalign.evaluation.figures import figure_text, rounded
from gsalign.tables import plain_table


@dataclass(frozen=True)
class PartMatch:
    """One true part and the predicted part that was assigned to it.

    Attributes:
        name: of the true part.
        predicted: number of the predicted part, from 0; None when there are fewer than true ones.
        iou: intersection over union of their pixels over all images; 0 without a predicted part,
            NaN when neither ever shows.
        stripe_iou: the same for the best assignment of as many horizontal stripes of the image,
            which know nothing of it: what has to be beaten.
        patch_iou: the same if every patch were given to whom most of its pixels belong: what masks
            of this resolution can reach.
        visibility: Pearson correlation of predicted and true visibility over the images; NaN where
            one of them never changes.
    """

    name: str
    predicted: int | None
    iou: float
    stripe_iou: float
    patch_iou: float
    visibility: float


@dataclass(frozen=True)
class PartAgreement:
    """How predicted parts agree with true ones.

    Attributes:
        matches: one per true part.
        foreground_iou: of all predicted parts together with all true parts together.
        images: how many were compared.
    """

    matches: tuple[PartMatch, ...]
    foreground_iou: float
    images: int

    @property
    def mean_iou(self) -> float:
        """Mean over the true parts that show."""
        return _mean([match.iou for match in self.matches])

    @property
    def mean_stripe_iou(self) -> float:
        """The same for stripes."""
        return _mean([match.stripe_iou for match in self.matches])

    @property
    def mean_patch_iou(self) -> float:
        """The same for the best masks of this resolution."""
        return _mean([match.patch_iou for match in self.matches])

    @property
    def mean_visibility(self) -> float:
        """Mean of the correlations that there are."""
        return _mean([match.visibility for match in self.matches])

    def as_dict(self) -> dict[str, object]:
        """For JSON: figures that do not exist are None."""
        return {
            "images": self.images,
            "mean_iou": rounded(self.mean_iou),
            "mean_stripe_iou": rounded(self.mean_stripe_iou),
            "mean_patch_iou": rounded(self.mean_patch_iou),
            "foreground_iou": rounded(self.foreground_iou),
            "mean_visibility_correlation": rounded(self.mean_visibility),
            "parts": {
                match.name: {
                    "predicted": match.predicted,
                    "iou": rounded(match.iou),
                    "stripe_iou": rounded(match.stripe_iou),
                    "patch_iou": rounded(match.patch_iou),
                    "visibility_correlation": rounded(match.visibility),
                }
                for match in self.matches
            },
        }

    def as_table(self) -> Table:
        """As a rich table, a row per true part and one for all."""
        table = plain_table(
            f"part masks against the truth, {self.images} images",
            ["True part"],
            ("predicted", "IoU", "of stripes", "at best", "visibility r"),
        )
        for match in self.matches:
            number = "-" if match.predicted is None else f"part {match.predicted}"
            figures = (match.iou, match.stripe_iou, match.patch_iou, match.visibility)
            table.add_row(match.name, number, *map(figure_text, figures))
        means = (self.mean_iou, self.mean_stripe_iou, self.mean_patch_iou, self.mean_visibility)
        table.add_row("mean", "", *map(figure_text, means))
        table.add_row("person against background", "", figure_text(self.foreground_iou), "", "", "")
        return table


class PartCounts:
    """Collects what :class:`PartAgreement` is made of, batch by batch.

    Args:
        names: of the true parts, in the order of their labels 1, 2, ...; other labels (0, the
            background, and those above) are no part.
        parts: number of predicted parts.
    """

    def __init__(self, names: Sequence[str], parts: int) -> None:
        self.names = tuple(names)
        self.parts = parts
        # [predicted part or background, true part or background], pixels.
        shape = (parts + 1, len(self.names) + 1)
        self.pixels = torch.zeros(shape, dtype=torch.int64)
        self.stripe_pixels = torch.zeros(shape, dtype=torch.int64)
        side = len(self.names) + 1
        self.patch_pixels = torch.zeros((side, side), dtype=torch.int64)
        self.predicted: list[Tensor] = []
        self.true: list[Tensor] = []

    def add(self, masks: Tensor, labels: Tensor, predicted: Tensor, true: Tensor) -> None:
        """Count a batch.

        Args:
            masks: ``[B, P + 1, rows, columns]`` probabilities; channel 0 is the background.
            labels: ``[B, H, W]`` true labels.
            predicted: ``[B, P]`` visibilities.
            true: ``[B, T]`` visible shares.
        """
        size = (labels.shape[-2], labels.shape[-1])
        labels = labels.cpu().long()
        labels = torch.where(labels > len(self.names), 0, labels)
        winners = _enlarged(masks.cpu().argmax(dim=1), size)
        _count(winners, labels, self.pixels)
        row = torch.arange(size[0]) * self.parts // max(size[0], 1)
        _count((1 + row).unsqueeze(1).expand_as(labels), labels, self.stripe_pixels)
        shares = F.one_hot(labels, len(self.names) + 1).permute(0, 3, 1, 2).float()
        majority = F.adaptive_avg_pool2d(shares, (masks.shape[-2], masks.shape[-1])).argmax(dim=1)
        _count(_enlarged(majority, size), labels, self.patch_pixels)
        self.predicted.append(predicted.float().cpu())
        self.true.append(true.float().cpu())

    def agreement(self) -> PartAgreement:
        """The figures of everything counted so far."""
        iou, stripe_iou, patch_iou = (
            _overlap(pixels) for pixels in (self.pixels, self.stripe_pixels, self.patch_pixels)
        )
        assigned, stripes = _assign(iou), _assign(stripe_iou)
        count = len(self.names)
        predicted = np.concatenate([np.zeros((0, self.parts)), *map(np.asarray, self.predicted)])
        true = np.concatenate([np.zeros((0, count)), *map(np.asarray, self.true)])
        matches = []
        for part, name in enumerate(self.names):
            mine, stripe = assigned.get(part), stripes.get(part)
            matches.append(
                PartMatch(
                    name=name,
                    predicted=mine,
                    iou=0.0 if mine is None else float(iou[mine, part]),
                    stripe_iou=0.0 if stripe is None else float(stripe_iou[stripe, part]),
                    patch_iou=float(patch_iou[part, part]),
                    visibility=math.nan
                    if mine is None
                    else _correlation(predicted[:, mine], true[:, part]),
                )
            )
        both = int(self.pixels[1:, 1:].sum())
        either = int(self.pixels.sum() - self.pixels[0, 0])
        return PartAgreement(tuple(matches), both / either if either else math.nan, len(true))


def _enlarged(winners: Tensor, size: tuple[int, int]) -> Tensor:
    """Winners ``[B, rows, columns]`` of patches as those of pixels ``[B, H, W]``."""
    return F.interpolate(winners.unsqueeze(1).float(), size=size, mode="nearest").squeeze(1).long()


def _count(predicted: Tensor, labels: Tensor, pixels: Tensor) -> None:
    """Add pixels to the table ``[predicted, true]``."""
    rows, columns = pixels.shape
    flat = (predicted * columns + labels).flatten()
    pixels += torch.bincount(flat, minlength=rows * columns).view(rows, columns)


def _overlap(pixels: Tensor) -> NDArray[np.float64]:
    """IoU of every predicted part with every true part ``[P, T]``; NaN where neither shows."""
    counts = pixels.numpy().astype(np.float64)
    union = counts.sum(1, keepdims=True) + counts.sum(0, keepdims=True) - counts
    with np.errstate(invalid="ignore"):
        iou: NDArray[np.float64] = (counts / union)[1:, 1:]
    return iou


def _assign(iou: NDArray[np.float64]) -> dict[int, int]:
    """True part -> predicted part, one to one, with the largest sum of IoU."""
    rows, columns = linear_sum_assignment(np.nan_to_num(iou), maximize=True)
    return {int(column): int(row) for row, column in zip(rows, columns, strict=True)}


def _correlation(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    if len(left) < 2 or np.ptp(left) == 0.0 or np.ptp(right) == 0.0:
        return math.nan
    return float(np.corrcoef(left, right)[0, 1])


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
