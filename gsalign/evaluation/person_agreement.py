"""Is it the person that is cut out? Predicted shares of the person against the true pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor

from gsalign.data.records import AERIAL, GROUND, VIEW_NAMES
from gsalign.evaluation.figures import figure_text, rounded
from gsalign.tables import plain_table

_BACKGROUND, _PERSON = 0, 1


@dataclass(frozen=True)
class PersonMatch:
    """What was cut out of the images of one view.

    Attributes:
        view: ``aerial`` or ``ground``.
        images: how many.
        iou: intersection over union of the pixels of which more than half is found to be of the
            person with those that are, over all images; NaN where neither shows.
        kept: mean share found in the pixels of the person, which is how much of the person is
            kept; NaN where nobody shows.
        left: mean share found in the pixels of the background, which is how much of the background
            is left; NaN where there is none.
    """

    view: str
    images: int
    iou: float
    kept: float
    left: float


@dataclass(frozen=True)
class PersonAgreement:
    """How what is cut out agrees with the true person, for each view."""

    matches: tuple[PersonMatch, ...]

    def as_dict(self) -> dict[str, object]:
        """For JSON: figures that do not exist are None."""
        return {
            match.view: {
                "images": match.images,
                "iou": rounded(match.iou),
                "person_kept": rounded(match.kept),
                "background_left": rounded(match.left),
            }
            for match in self.matches
        }

    def as_table(self) -> Table:
        """As a rich table, a row per view."""
        table = plain_table(
            "who is cut out against the true person",
            ["View"],
            ("images", "IoU", "person kept", "background left"),
        )
        for match in self.matches:
            figures = (match.iou, match.kept, match.left)
            table.add_row(match.view, str(match.images), *map(figure_text, figures))
        return table


class PersonCounts:
    """Collects what :class:`PersonAgreement` is made of, batch by batch."""

    def __init__(self) -> None:
        self.figures: list[Tensor] = []
        self.views: list[Tensor] = []

    def add(self, shares: Tensor, labels: Tensor, views: Tensor) -> None:
        """Count a batch.

        Args:
            shares: ``[B, 1, H, W]``, of the person in every pixel, 0 to 1.
            labels: uint8 ``[B, H, W]``, what every pixel shows: 0 the background, 1 the person,
                else unknown, which does not count.
            views: ``[B]``, 0 ground, 1 aerial.

        Raises:
            ValueError: the sizes do not belong together.
        """
        batch, size = len(labels), tuple(labels.shape[1:])
        if tuple(shares.shape) != (batch, 1, *size) or tuple(views.shape) != (batch,):
            raise ValueError(
                f"shares and views must be {[batch, 1, *size]} and [{batch}] for labels "
                f"{list(labels.shape)}, got {list(shares.shape)} and {list(views.shape)}"
            )
        shares, labels = shares.squeeze(1).cpu().double(), labels.cpu()
        person, background, found = labels == _PERSON, labels == _BACKGROUND, shares > 0.5
        # Of every image its sums: they take no room, and however the batches are cut they add up
        # to the same.
        pixels = (
            found & person,
            person | (found & background),
            person,
            background,
            shares * person,
            shares * background,
        )
        self.figures.append(torch.stack([each.double().sum(dim=(1, 2)) for each in pixels], dim=1))
        self.views.append(views.cpu())

    def agreement(self) -> PersonAgreement:
        """The figures of everything counted so far; a view without images is left out."""
        figures = torch.cat([torch.zeros(0, 6, dtype=torch.float64), *self.figures])
        views = torch.cat([torch.zeros(0, dtype=torch.int64), *self.views])
        matches = []
        for view in (AERIAL, GROUND):
            chosen = figures[views == view]
            if not len(chosen):
                continue
            both, either, person, background, kept, left = chosen.sum(dim=0).tolist()
            matches.append(
                PersonMatch(
                    view=VIEW_NAMES[view],
                    images=len(chosen),
                    iou=_over(both, either),
                    kept=_over(kept, person),
                    left=_over(left, background),
                )
            )
        return PersonAgreement(tuple(matches))


def _over(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
