"""Circular correlation against its definition, and the table of angles against the true roll."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from rich.console import Console

from gsalign.evaluation.roll_agreement import COMPOSED, circular_correlation, roll_agreement


def by_definition(a, b):
    top = left = right = 0.0
    for i in range(len(a)):
        for j in range(i):
            s, t = math.sin(a[i] - a[j]), math.sin(b[i] - b[j])
            top, left, right = top + s * t, left + s * s, right + t * t
    return top / math.sqrt(left * right)


@pytest.fixture
def roll():
    return np.random.default_rng(0).uniform(-math.pi, math.pi, 40)


def test_it_is_fisher_and_lees(roll):
    other = roll + np.random.default_rng(1).normal(0, 0.8, 40)
    assert circular_correlation(roll, other) == pytest.approx(by_definition(roll, other))


def test_a_constant_does_not_matter_and_the_sense_does(roll):
    assert circular_correlation(roll, roll + 2.0) == pytest.approx(1.0)
    assert circular_correlation(roll, 1.0 - roll) == pytest.approx(-1.0)
    assert circular_correlation(roll, roll + 2 * math.pi * np.arange(40)) == pytest.approx(1.0)


def test_what_never_changes_correlates_with_nothing(roll):
    assert math.isnan(circular_correlation(np.full(40, 0.3), roll))
    assert math.isnan(circular_correlation(roll[:1], roll[:1]))


def test_samples_of_different_length_are_refused(roll):
    with pytest.raises(ValueError, match=r"\[40\] and \[39\]"):
        circular_correlation(roll, roll[1:])


def test_angles_are_compared_by_view_and_as_a_sum(roll):
    aerial = np.arange(40) < 30
    half = roll / 2
    agreement = roll_agreement(
        {"image": half, "layer 0": half}, roll, {"aerial": aerial, "ground": ~aerial}
    )
    rows = {(match.angle, match.view): match for match in agreement.matches}
    assert len(rows) == 6
    whole = rows[COMPOSED, "aerial"]
    assert whole.correlation == pytest.approx(1.0) and whole.images == 30
    assert whole.error == pytest.approx(0.0, abs=1e-6) and whole.upright == 1.0
    assert rows["image", "ground"].error == pytest.approx(
        math.degrees(np.median(np.abs(half[~aerial])))
    )
    tree = json.loads(json.dumps(agreement.as_dict()))
    assert tree["image"]["ground"]["images"] == 10
    console = Console(width=100, record=True)
    console.print(agreement.as_table())
    assert "circular r" in console.export_text()


def test_a_view_without_images_has_no_row(roll):
    nobody = np.zeros(40, bool)
    agreement = roll_agreement({"image": roll}, roll, {"aerial": ~nobody, "ground": nobody})
    assert [match.view for match in agreement.matches] == ["aerial"]
