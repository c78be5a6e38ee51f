"""Pictures of a study: every run is on them, in its place."""

from __future__ import annotations

import math
import sys
import warnings

import pytest
from matplotlib.collections import PathCollection
from PIL import Image

from gsalign.study import StudyRow
from gsalign.study.rows import METRICS
from gsalign.visualize import study_curves, study_points
from gsalign.visualize.style import new_figure

FIGURES = {"baseline": (40.0, 42.0), "new": (43.0, 47.0), "stopped": (41.0,)}


@pytest.fixture(autouse=True)
def no_warnings():
    """A picture whose parts do not fit makes matplotlib warn; that is a fault."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def figures(monkeypatch):
    """The figures that were made, to look at what was put on them."""
    made = []

    def keep(*arguments):
        made.append(new_figure(*arguments))
        return made[-1]

    monkeypatch.setattr(sys.modules["gsalign.visualize.study"], "new_figure", keep)
    return made


@pytest.fixture
def rows() -> list[StudyRow]:
    return [
        StudyRow(
            variant=variant,
            seed=seed,
            protocol=protocol,
            step=step,
            steps=20,
            figures=dict.fromkeys(METRICS, value + step - 20.0),
            valid_queries=8,
            seconds=1.0,
            data="",
            gsalign="1",
            torch="2",
            commit="c",
            machine="m",
        )
        for variant, values in FIGURES.items()
        for seed, value in enumerate(values)
        for protocol in ("all", "ground-ground", "aerial-aerial", "aerial-to-ground")
        for step in (10, 20)
    ]


def test_points_are_the_ends_of_the_runs(rows, figures, tmp_path):
    path = tmp_path / "study.png"
    study_points(rows, path, baseline="baseline", title="a study")
    with Image.open(path) as picture:
        assert picture.format == "PNG"
    panels = [axes for axes in figures[0].axes if axes.axison]
    assert [panel.get_title(loc="left") for panel in panels] == ["ALL", "G<->G", "A<->A", "A->G"]
    for number, panel in enumerate(panels):
        dots = [d.get_offsets().tolist() for d in panel.findobj(PathCollection)]
        assert dots == [
            [[value, place] for value in values] for place, values in enumerate(FIGURES.values())
        ]
        # A stroke at every mean, a bar where there is a spread, and the baseline's line.
        lines = [line.get_xdata() for line in panel.lines]
        means = [line[0] for line in lines if line[0] == line[1]]
        assert sorted(means) == [41.0, 41.0, 41.0, 45.0]
        assert len(lines) == 6
        # The first column names the variants for its row.
        names = [text.get_text() for text in panel.get_yticklabels() if text.get_visible()]
        assert names == (list(FIGURES) if number in (0, 3) else [])


def test_curves_are_means_over_the_seeds(rows, figures, tmp_path):
    study_curves(rows, tmp_path / "curves.png", protocols=["aerial-to-ground"], title="a study")
    (panel,) = figures[0].axes
    found = {line.get_label(): line.get_xydata().tolist() for line in panel.lines}
    assert found == {
        "baseline": [[10, 31.0], [20, 41.0]],
        "new": [[10, 35.0], [20, 45.0]],
        "stopped": [[10, 31.0], [20, 41.0]],
    }
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == list(FIGURES)


def test_missing_figures_leave_a_gap(rows, figures, tmp_path):
    for row in rows:
        if row.variant == "new" and row.protocol == "all":
            row.figures["mAP"] = math.nan
    study_points(rows, tmp_path / "study.png", baseline="baseline", protocols=["all"])
    study_curves(rows, tmp_path / "curves.png", protocols=["all"])
    points, curves = figures
    assert len(points.axes[0].findobj(PathCollection)) == 2
    assert [len(line.get_xdata()) for line in curves.axes[0].lines] == [2, 0, 2]


def test_nothing_to_draw_is_told(rows, tmp_path):
    for draw in (study_points, study_curves):
        with pytest.raises(ValueError, match="nothing to draw"):
            draw(rows, tmp_path / "none.png", protocols=["ground-to-aerial"])
        with pytest.raises(ValueError, match="nothing to draw"):
            draw([], tmp_path / "none.png")
    assert not list(tmp_path.iterdir())
