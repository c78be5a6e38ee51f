"""What is cut out against the true person, on masks that can be counted by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from rich.console import Console

from gsalign.data import AERIAL, GROUND
from gsalign.evaluation.person_agreement import PersonCounts


def agreement_of(shares, labels, views):
    counts = PersonCounts()
    counts.add(
        torch.tensor(shares).unsqueeze(1),
        torch.tensor(labels, dtype=torch.uint8),
        torch.tensor(views),
    )
    return counts.agreement()


def test_figures_counted_by_hand():
    """Half a pixel is not found; an unknown pixel counts nowhere, whatever its share."""
    agreement = agreement_of(
        [
            [[1.0, 0.75, 0.5], [0.0, 0.75, 1.0]],
            [[0.25, 0.0, 1.0], [1.0, 1.0, 1.0]],
            [[0.5, 1.0, 0.0], [0.0, 0.0, 0.25]],
        ],
        [
            [[1, 1, 1], [0, 0, 255]],
            [[0, 0, 1], [255, 1, 0]],
            [[1, 1, 0], [0, 0, 255]],
        ],
        [AERIAL, AERIAL, GROUND],
    )
    aerial, ground = agreement.matches
    assert (aerial.view, aerial.images) == ("aerial", 2)
    # Of 5 true pixels 4 are found, and 2 of the background besides.
    assert aerial.iou == 4 / 7
    assert aerial.kept == (1.0 + 0.75 + 0.5 + 1.0 + 1.0) / 5
    assert aerial.left == (0.0 + 0.75 + 0.25 + 0.0 + 1.0) / 5
    assert (ground.view, ground.images) == ("ground", 1)
    assert (ground.iou, ground.kept, ground.left) == (1 / 2, 0.75, 0.0)


def test_the_union_is_over_all_pixels_of_a_view():
    """Not a mean of the images: who is small counts little."""
    shares = [[[1.0, 1.0, 1.0, 1.0]], [[0.0, 0.0, 1.0, 0.0]]]
    labels = [[[1, 1, 1, 1]], [[1, 0, 0, 0]]]
    (match,) = agreement_of(shares, labels, [GROUND, GROUND]).matches
    assert match.iou == 4 / 6 and match.kept == 4 / 5 and match.left == 1 / 3


def test_where_nobody_shows_there_are_figures_of_the_background_alone():
    agreement = agreement_of([[[0.25, 0.5]]], [[[0, 0]]], [GROUND])
    (match,) = agreement.matches
    assert math.isnan(match.iou) and math.isnan(match.kept) and match.left == 0.375
    assert json.loads(json.dumps(agreement.as_dict(), allow_nan=False)) == {
        "ground": {"images": 1, "iou": None, "person_kept": None, "background_left": 0.375}
    }
    # Somebody found where nobody is: that is no missing figure.
    (match,) = agreement_of([[[0.25, 1.0]]], [[[0, 0]]], [GROUND]).matches
    assert match.iou == 0.0 and math.isnan(match.kept)
    (match,) = agreement_of([[[1.0, 1.0]]], [[[1, 255]]], [GROUND]).matches
    assert (match.iou, match.kept) == (1.0, 1.0) and math.isnan(match.left)


def test_nobody_in_one_image_takes_nothing_from_the_others():
    shares = [[[0.75, 0.5]], [[0.0, 0.25]]]
    (match,) = agreement_of(shares, [[[1, 0]], [[0, 0]]], [AERIAL, AERIAL]).matches
    assert (match.images, match.iou, match.kept, match.left) == (2, 1.0, 0.75, 0.25)


def test_nothing_counted_is_an_empty_table():
    assert PersonCounts().agreement().matches == ()
    assert PersonCounts().agreement().as_dict() == {}


def test_batches_add_up():
    """To the last digit, and no mask is held."""
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(7, 1, 6, 5, generator=generator)
    labels = torch.tensor([0, 1, 255], dtype=torch.uint8)[
        torch.randint(0, 3, (7, 6, 5), generator=generator)
    ]
    views = torch.tensor([AERIAL, GROUND, AERIAL, AERIAL, GROUND, GROUND, AERIAL])
    whole, pieces = PersonCounts(), PersonCounts()
    whole.add(shares, labels, views)
    for part in (slice(0, 1), slice(1, 5), slice(5, 7)):
        pieces.add(shares[part], labels[part], views[part])
    assert whole.agreement() == pieces.agreement()
    assert [match.images for match in pieces.agreement().matches] == [4, 3]
    held = [each.shape for each in (*pieces.figures, *pieces.views)]
    assert all(math.prod(shape) < shares[0].numel() for shape in held)


@pytest.mark.parametrize(
    ("shares", "views"), [((2, 4, 3), (2,)), ((2, 1, 8, 6), (2,)), ((2, 1, 4, 3), (1,))]
)
def test_what_does_not_belong_together_is_refused(shares, views):
    labels = torch.zeros(2, 4, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"must be \[2, 1, 4, 3\] and \[2\] for labels"):
        PersonCounts().add(torch.zeros(shares), labels, torch.zeros(views, dtype=torch.int64))


def test_the_table_has_a_dash_where_there_is_no_figure():
    console = Console(width=80, record=True)
    console.print(agreement_of([[[0.25]], [[1.0]]], [[[0]], [[1]]], [AERIAL, GROUND]).as_table())
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["aerial", "1", "-", "-", "0.250"] in lines
    assert ["ground", "1", "1.000", "1.000", "-"] in lines
