"""CMC curves and training curves of runs beside one another."""

from __future__ import annotations

import numpy as np
import pytest
from drawn import colours, texts

from gsalign.evaluation import EvaluationResult
from gsalign.visualize import cmc_curves, compared_curves
from gsalign.visualize.run_lines import run_style


def result(name: str, first_ranks: list[int], precision: float = 0.5) -> EvaluationResult:
    first = np.asarray(first_ranks, np.int64)
    return EvaluationResult(
        protocol=name,
        query_indices=np.arange(len(first)),
        num_positives=(first > 0).astype(np.int64),
        first_rank=first,
        average_precision=np.where(first > 0, precision, np.nan),
        inp=np.where(first > 0, precision, np.nan),
        num_gallery=60,
    )


def test_curves_are_the_share_of_queries_answered(tmp_path, panels):
    path = tmp_path / "cmc.png"
    runs = {
        "one": {"all": result("all", [1, 2, 4, 30, 0]), "aerial-to-ground": result("x", [1, 1])},
        "two": {"all": result("all", [1, 1, 1, 3], 0.25)},
    }
    cmc_curves(runs, path, title="runs", note="mind this")
    assert len(colours(path)) > 50
    (figure,) = panels
    everybody, one_way, bars = figure.axes
    one, two = (line.get_ydata() for line in everybody.lines)
    assert len(one) == len(two) == 20
    assert one[:5] == pytest.approx([25, 50, 50, 75, 75]) and one[-1] == pytest.approx(75)
    assert two[:3] == pytest.approx([75, 75, 100])
    assert list(everybody.lines[0].get_xdata()[[0, -1]]) == [1, 20]
    assert len(one_way.lines) == 1
    heights = [bar.get_height() for bar in bars.patches]
    assert heights[:3] == pytest.approx([50, 50, 25]) and np.isnan(heights[3])
    told = texts(figure)
    assert {"runs", "mind this", "one", "two", "mAP 25.0, Rank-1 75.0"} <= set(told)
    assert "ALL, 4 queries" in told and "A->G, 2 queries" in told


def test_a_curve_may_be_shorter_and_a_single_run_needs_no_name(tmp_path, panels):
    cmc_curves({"alone": {"all": result("all", [1, 2])}}, tmp_path / "cmc.png", ranks=5)
    assert len(panels[0].axes[0].lines[0].get_ydata()) == 5
    assert "alone" not in texts(panels[0])


def test_a_protocol_without_a_valid_query_has_no_curve(tmp_path, panels):
    cmc_curves({"run": {"all": result("all", [0, 0])}}, tmp_path / "cmc.png")
    assert not panels[0].axes[0].lines


def test_lines_of_runs_differ_in_more_than_colour():
    styles = [run_style(place) for place in range(8)]
    assert len({colour for colour, _ in styles}) == 8
    assert all(styles[i][1] != styles[i + 1][1] for i in range(7))
    assert len({run_style(place) for place in range(32)}) == 32


@pytest.mark.parametrize(
    ("runs", "ranks", "told"),
    [({}, 20, "no results"), ({"run": {}}, 20, "no results"), (None, 1, "ranks is 1")],
)
def test_curves_of_nothing_are_refused(tmp_path, runs, ranks, told):
    runs = {"run": {"all": result("all", [1])}} if runs is None else runs
    with pytest.raises(ValueError, match=told):
        cmc_curves(runs, tmp_path / "cmc.png", ranks=ranks)
    assert not (tmp_path / "cmc.png").exists()


def records(losses: list[float], figures: list[float | None]) -> list[dict]:
    made = [
        {"kind": "train", "iteration": 10 * place, "total_loss": loss}
        for place, loss in enumerate(losses, 1)
    ]
    for place, value in enumerate(figures, 1):
        protocols = {"all": {"mAP": value, "Rank-1": value and 2 * value}}
        made += [
            {"kind": "evaluation", "iteration": 20 * place, "split": split, "protocols": protocols}
            for split in ("validation", "test")
        ]
    return made


def test_training_of_runs_is_drawn_a_line_each(tmp_path, panels):
    path = tmp_path / "curves.png"
    runs = {"one": records([3.0, 2.0, 1.0], [10.0, None, 30.0]), "two": records([5.0], [])}
    compared_curves(runs, path, title="runs", note="mind this")
    assert len(colours(path)) > 50
    loss, mean_precision, first = panels[0].axes
    assert [list(line.get_ydata()) for line in loss.lines] == [[3, 2, 1], [5]]
    assert list(loss.lines[0].get_xdata()) == [10, 20, 30]
    # A figure that is not there leaves no point; the validation is not drawn.
    assert [list(line.get_xdata()) for line in mean_precision.lines] == [[20, 60], []]
    assert list(mean_precision.lines[0].get_ydata()) == [10, 30]
    assert list(first.lines[0].get_ydata()) == [20, 60]
    assert {"runs", "mind this", "one", "two"} <= set(texts(panels[0]))


def test_runs_that_were_never_evaluated_say_so(tmp_path, panels):
    compared_curves({"one": records([3.0], [])}, tmp_path / "curves.png")
    assert texts(panels[0]).count("not evaluated yet") == 2
    with pytest.raises(ValueError, match="no train record"):
        compared_curves({"one": records([], [1.0])}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
