"""What a study says of its figures, and the study files in configs/."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from gsalign.errors import DataError
from gsalign.study import (
    StudyConfig,
    StudyFolder,
    StudyRow,
    markdown_report,
    paired_spread,
    plan_runs,
    read_rows,
    read_study,
    spread,
    summarise,
    write_rows,
)
from gsalign.study.report import sheets
from gsalign.study.rows import METRICS

CONFIGS = Path(__file__).parents[2] / "configs"


def row(variant: str, seed: int, mAP: float, **changes: object) -> StudyRow:
    values: dict = {
        **{"variant": variant, "seed": seed, "protocol": "all", "step": 10, "steps": 10},
        **{"figures": dict.fromkeys(METRICS, mAP), "valid_queries": 8, "seconds": 1.5},
        **{"data": "", "gsalign": "1", "torch": "2", "commit": "abc", "machine": "a, b"},
    }
    return StudyRow(**{**values, **changes})


def test_mean_deviation_and_interval_are_those_of_the_textbook():
    values = [41.0, 43.5, 42.2, 47.1]
    found = spread(values)
    assert (found.mean, found.count) == (pytest.approx(np.mean(values)), 4)
    assert found.std == pytest.approx(np.std(values, ddof=1))
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert found.half_width == pytest.approx((high - low) / 2)


def test_one_value_has_no_spread_and_nothing_has_no_mean():
    one = spread([3.0])
    assert one.mean == 3.0 and math.isnan(one.std) and math.isnan(one.half_width)
    assert not one.differs_from_zero
    nothing = spread([])
    assert nothing.count == 0 and math.isnan(nothing.mean)
    assert spread([1.0, math.nan, 3.0]) == spread([1.0, 3.0])


def test_pairing_takes_away_what_a_seed_does_to_both():
    baseline = {0: 40.0, 1: 50.0, 2: 60.0}
    ours = {0: 41.0, 1: 51.2, 2: 60.8, 7: 99.0}
    gain = paired_spread(ours, baseline)
    assert (gain.mean, gain.count) == (pytest.approx(1.0), 3)
    assert gain.std == pytest.approx(0.2)
    assert gain.differs_from_zero
    assert spread(list(baseline.values())).std == pytest.approx(10.0)


def test_a_gain_that_may_be_chance_is_not_said_to_differ():
    assert not paired_spread({0: 1.0, 1: 5.0}, {0: 0.0, 1: 0.0}).differs_from_zero


def test_summaries_take_the_ends_of_the_runs_by_protocol():
    rows = [
        row("baseline", 0, 10.0, step=5),
        row("baseline", 0, 40.0),
        row("baseline", 1, 44.0),
        row("new", 0, 43.0),
        row("new", 0, 7.0, protocol="aerial-to-ground"),
    ]
    first, second, other = summarise(rows, baseline="baseline", metrics=["mAP"])
    assert (first.variant, first.figures["mAP"].mean, first.gains) == ("baseline", 42.0, {})
    assert (second.variant, second.gains["mAP"].mean, second.gains["mAP"].count) == ("new", 3.0, 1)
    # A protocol that the baseline lacks has nothing to compare with.
    assert (other.protocol, other.gains["mAP"].count) == ("aerial-to-ground", 0)
    only = summarise(rows, baseline="baseline", metrics=["mAP"], protocols=["all"])
    assert [summary.protocol for summary in only] == ["all", "all"]


def test_the_page_says_what_the_figures_are(tmp_path):
    study = StudyConfig.model_validate(
        {
            "name": "s",
            "config": "c.yaml",
            "data": {"d": {"root": "r"}},
            "variants": {"baseline": {}, "new": {"about": "better"}, "worse": {}},
            "metrics": ["mAP"],
        }
    )
    gains = {"new": (3.0, 3.2, 3.1), "worse": (-9.0, 9.0, 1.0)}
    rows = [row("baseline", seed, 40.0 + seed) for seed in range(3)]
    rows += [row(n, s, 40.0 + s + gain) for n, all_ in gains.items() for s, gain in enumerate(all_)]
    page = markdown_report(study, rows)
    assert "| new | 3 | 44.1 ± 1.1 | +3.1 ± 0.1 * |" in page
    assert "| worse | 3 | 41.3 ± 9.6 | +0.3 ± 9.0 |" in page
    assert "| baseline | 3 | 41.0 ± 1.0 |  |" in page
    assert "| new | better |" in page and "9 runs of 10 steps" in page and "commit abc;" in page
    assert "No run has finished." in markdown_report(study, [])


def test_the_main_figure_is_told_by_all_protocols_at_once():
    study = StudyConfig.model_validate(
        {
            "name": "s",
            "config": "c.yaml",
            "data": {"d": {"root": "r"}},
            "variants": {"baseline": {}, "new": {}},
            "metrics": ["Rank-1", "mAP"],
        }
    )
    rows = [row("baseline", 0, 40.0), row("baseline", 0, 30.0, protocol="ground-to-aerial")]
    # The data set of a variant may know fewer protocols.
    rows += [row("new", 0, 42.5)]
    first, second, *each = sheets(study, rows)
    assert (first.title, first.headings) == ("mAP", ("variant", "ALL", "G->A"))
    assert first.rows == [("baseline", "40.0", "30.0"), ("new", "42.5", "-")]
    assert (second.title, second.rows) == ("Δ mAP", [("new", "+2.5", "-")])
    assert [sheet.title for sheet in each] == ["ALL, 8 queries", "G->A, 8 queries"]
    assert each[0].rows[1] == ("new", "1", "42.5", "42.5", "+2.5", "+2.5")
    # One protocol is its own overview.
    assert len(sheets(study, rows[:1])) == 1


def test_a_table_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "study.csv"
    rows = [row("a,b", 3, 12.3456), row("c", 4, math.nan, protocol="x")]
    write_rows(path, rows)
    first, second = read_rows(path)
    assert first == rows[0]
    assert math.isnan(second.figures["mAP"]) and second.protocol == "x"
    path.write_text(path.read_text().replace("12.3456", "much"))
    with pytest.raises(DataError, match=r"study\.csv, line 2: .*much"):
        read_rows(path)


STUDIES = ["aligned", "cargo", "demo", "long", "turned"]


def test_the_studies_of_configs_load_and_compare_with_one_baseline(tmp_path):
    files = sorted(CONFIGS.glob("study_*.yaml"))
    assert [path.stem.removeprefix("study_") for path in files] == STUDIES
    for path in files:
        study = read_study(path)
        runs = plan_runs(study, StudyFolder(tmp_path), source=path)
        assert len(runs) == len(study.variants) * len(study.seeds) >= 6
        models = {run.variant: run.config.model for run in runs}
        baseline = models.pop(study.baseline_name)
        assert not baseline.ltps_layers and not baseline.dam.enabled and not baseline.parts
        # Training is the same for all of them.
        assert len({run.config.training.model_dump_json() for run in runs}) == 1
        if path.stem == "study_turned":
            assert models == {"turned": baseline}
            continue
        if path.stem in ("study_aligned", "study_long"):
            ours = models["aligned_taught"].orientation
            assert ours.cuts_out and ours.turns and ours.pretrained and ours.reads == "parts"
            continue
        assert models.keys() >= {"upright", "ltps", "ltps_dam", "parts", "aligned"}
        assert models["upright"] == models["rotated"] == baseline
        assert models["ltps_dam"].dam.enabled and models["ltps_dam"].ltps_layers
        assert models["parts"].losses.part_labels and not models["parts"].ltps_layers
        assert models["aligned"].orientation.enabled and not models["aligned"].dam.enabled
        plain, upright = (study.data[name].generate for name in ("rolled", "upright"))
        assert plain is not None and upright == plain.model_copy(update={"aerial_roll": 0.0})


def test_the_turned_set_is_compared_with_the_very_runs_of_the_demo(tmp_path):
    demo, turned = (
        plan_runs(
            read_study(CONFIGS / f"study_{name}.yaml"), StudyFolder(tmp_path), only=["baseline"]
        )
        for name in ("demo", "turned")
    )
    assert demo == turned
