"""Agreement of predicted part masks with true ones, on maps that can be counted by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from rich.console import Console

from gsalign.evaluation.part_agreement import PartCounts

NAMES = ("head", "legs")


def one_hot(winners: torch.Tensor, channels: int) -> torch.Tensor:
    """``[B, rows, columns]`` winners as masks ``[B, channels, rows, columns]``."""
    masks = torch.nn.functional.one_hot(winners, channels).permute(0, 3, 1, 2)
    return 0.1 + 0.5 * masks


def count(winners, labels, *, parts=2, predicted=None, true=None):
    counts = PartCounts(NAMES, parts)
    batch = len(labels)
    counts.add(
        one_hot(torch.tensor(winners), parts + 1),
        torch.tensor(labels, dtype=torch.uint8),
        torch.rand(batch, parts) if predicted is None else torch.tensor(predicted),
        torch.rand(batch, len(NAMES)) if true is None else torch.tensor(true),
    )
    return counts.agreement()


def test_names_of_predicted_parts_do_not_matter():
    labels = [[[0, 1], [2, 2], [0, 2]]]
    same = count(labels, labels)
    swapped = count([[[0, 2], [1, 1], [0, 1]]], labels)
    assert [m.iou for m in same.matches] == [m.iou for m in swapped.matches] == [1.0, 1.0]
    assert [m.predicted for m in same.matches] == [0, 1]
    assert [m.predicted for m in swapped.matches] == [1, 0]
    assert same.foreground_iou == swapped.foreground_iou == 1.0


def test_intersection_over_union_counted_by_hand():
    labels = [[[1, 1, 0], [2, 2, 2]], [[0, 1, 0], [0, 2, 0]]]
    winners = [[[1, 0, 0], [2, 2, 1]], [[1, 1, 1], [0, 0, 2]]]
    agreement = count(winners, labels)
    # head: 2 shared of 3 true and 5 predicted; legs: 2 shared of 4 true and 3 predicted.
    assert [m.iou for m in agreement.matches] == pytest.approx([2 / 6, 2 / 5])
    assert agreement.mean_iou == pytest.approx((2 / 6 + 2 / 5) / 2)
    # Person: 5 of the 7 true and 8 predicted pixels are shared.
    assert agreement.foreground_iou == pytest.approx(5 / 10)
    # Stripes of one row: the upper has 3 of 6 pixels, the lower 4.
    assert [m.stripe_iou for m in agreement.matches] == pytest.approx([3 / 6, 4 / 6])
    assert [m.patch_iou for m in agreement.matches] == [1.0, 1.0]
    assert agreement.images == 2


def test_masks_are_brought_to_the_size_of_the_labels_and_other_labels_are_background():
    labels = torch.zeros(1, 8, 4, dtype=torch.uint8)
    labels[:, :4, :2], labels[:, 4:, 2:], labels[:, :4, 2:] = 1, 2, 7
    agreement = count([[[1, 0], [0, 2]]], labels.tolist())
    assert [m.iou for m in agreement.matches] == [1.0, 1.0]
    assert [m.patch_iou for m in agreement.matches] == [1.0, 1.0]
    # A part that has the most of no patch cannot be found by masks of patches.
    labels[:, 4:, 2:] = 0
    labels[:, 7, 3] = 2
    assert [m.patch_iou for m in count([[[1, 0], [0, 2]]], labels.tolist()).matches] == [1.0, 0.0]


def test_fewer_predicted_than_true_parts():
    agreement = count([[[1, 1], [0, 0]]], [[[1, 1], [2, 2]]], parts=1)
    assert [m.predicted for m in agreement.matches] == [0, None]
    assert [m.iou for m in agreement.matches] == [1.0, 0.0]
    assert math.isnan(agreement.matches[1].visibility)


def test_what_never_shows_has_no_figure():
    agreement = count([[[0, 0]]], [[[0, 0]]], parts=2)
    assert all(math.isnan(m.iou) for m in agreement.matches)
    assert math.isnan(agreement.foreground_iou) and math.isnan(agreement.mean_iou)
    assert agreement.as_dict()["mean_iou"] is None
    json.dumps(agreement.as_dict(), allow_nan=False)


def test_visibilities_correlate_with_those_of_the_assigned_part():
    labels = [[[1, 2]]] * 4
    swapped = [[[2, 1]]] * 4
    shown = [0.1, 0.5, 0.4, 0.9]
    agreement = count(
        swapped,
        labels,
        predicted=[[1.0 - s, 2.0 * s] for s in shown],
        true=[[s, 0.5] for s in shown],
    )
    assert agreement.matches[0].visibility == pytest.approx(1.0)
    assert math.isnan(agreement.matches[1].visibility)  # the truth never changes
    assert agreement.mean_visibility == pytest.approx(1.0)


def test_batches_add_up():
    generator = torch.Generator().manual_seed(0)
    winners = torch.randint(0, 3, (6, 4, 2), generator=generator)
    labels = torch.randint(0, 3, (6, 4, 2), generator=generator).to(torch.uint8)
    seen, true = torch.rand(6, 2, generator=generator), torch.rand(6, 2, generator=generator)
    whole, pieces = PartCounts(NAMES, 2), PartCounts(NAMES, 2)
    whole.add(one_hot(winners, 3), labels, seen, true)
    for part in (slice(0, 1), slice(1, 6)):
        pieces.add(one_hot(winners[part], 3), labels[part], seen[part], true[part])
    assert whole.agreement() == pieces.agreement()


def test_the_table_names_every_part_and_the_yardstick():
    console = Console(width=100, record=True)
    console.print(count([[[1, 2]]], [[[1, 2]]]).as_table())
    text = console.export_text()
    for word in ("head", "legs", "part 0", "part 1", "stripes", "visibility", "1 images"):
        assert word in text
