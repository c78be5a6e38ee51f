"""The benchmark harness: figures, bytes, columns, and that wrong or absent providers are told."""

from __future__ import annotations

import csv
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import __main__ as command
from benchmarks import (
    bench_conv,
    bench_distance,
    bench_pool,
    bench_prototype,
    bench_ranking,
    bench_tps,
    bench_warp,
    glance,
    plot,
    rows,
)
from benchmarks.case import BACKWARD, BOTH, FORWARD, Case, Choice, Provider, eager
from benchmarks.check import WrongResultError, relative_error, worst_error
from benchmarks.measure import COPY, measure_case, minimal_bytes
from benchmarks.table import ratios
from benchmarks.timing import Settings, WallClock, interleave, percentile
from benchmarks.yardstick import copy_nt

CPU = torch.device("cpu")
CHOICE = Choice(CPU, quick=True, compile=False)
SHORT = Settings(seconds=0.0, least_rounds=3, most_rounds=3)
CONDITIONS = rows.Conditions(
    "a, b", 2, "heap kept", "2.11", "none", "none", "abc1234", "2026-01-02"
)


@pytest.fixture(autouse=True)
def small_copies(monkeypatch):
    monkeypatch.setattr("benchmarks.yardstick.LEAST_BYTES", {"cpu": 1 << 16})


def doubled(tensors):
    return (2.0 * tensors["x"],)


def toy(*providers: Provider, dtype: torch.dtype = torch.float32) -> Case:
    return Case(
        op="double",
        shape="N6",
        dtype=dtype,
        inputs=lambda device: {"x": torch.arange(1.0, 7.0, device=device).to(dtype)},
        leaves=("x",),
        reference=doubled,
        providers=(eager(doubled), *providers),
    )


def test_percentiles_of_known_samples():
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([0.0, 10.0], 0.2) == pytest.approx(2.0)
    assert percentile([10.0, 20.0, 30.0, 40.0, 50.0, 60.0], 0.8) == pytest.approx(50.0)
    assert percentile([7.0], 0.2) == 7.0
    with pytest.raises(ValueError, match="at least one"):
        percentile([], 0.5)
    with pytest.raises(ValueError, match="0 to 1"):
        percentile([1.0], 1.5)


def test_rounds_take_turns_and_the_first_is_not_counted():
    order = []
    subjects = {name: [lambda name=name: order.append(name)] for name in "abc"}
    samples = interleave(subjects, WallClock(), SHORT)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(times) for name, times in samples.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_call_that_times_itself_is_believed():
    assert WallClock().turn([lambda: 0.25]) == [250.0]


def test_bytes_of_the_token_warp_are_those_counted_by_hand():
    case = bench_warp.cases(CHOICE)[0]
    tensors = case.inputs(CPU)
    outputs = case.reference(tensors)
    tokens = 8 * 128 * 768 * 4
    small = 4 * 2 * 4 + 8 * 4 + 128 * 4 * 4  # source points, angles, basis
    leaves = 4 * 2 * 4 + 8 * 4
    forward = minimal_bytes(case, FORWARD, tensors, outputs)
    assert forward == 2 * tokens + small
    backward = minimal_bytes(case, BACKWARD, tensors, outputs)
    assert backward == 3 * tokens + small + leaves
    assert minimal_bytes(case, BOTH, tensors, outputs) == forward + backward


def test_the_backward_pass_alone_is_checked_and_timed_without_the_forward():
    calls = []

    def run(tensors):
        calls.append(1)
        return (tensors["x"] * 2,)

    only = Provider("only forward", lambda t: (t["x"] * 2,), passes=(FORWARD,))
    case = replace(toy(Provider("counted", run), only), passes=(FORWARD, BACKWARD))
    rows = list(measure_case(case, CHOICE, SHORT))
    backward = [row for row in rows if row.pass_name == BACKWARD]
    assert [row.implementation for row in backward] == ["reference", "counted", COPY]
    assert backward[1].error == 0.0 and backward[1].calls == 3
    # Forward: once to check, then a warm-up and the rounds. Backward: once, to make the graph.
    assert len(calls) == 1 + 1 + 3 + 1


def test_bytes_count_the_type():
    single, half = (c for c in bench_pool.cases(CHOICE) if c.shape.endswith("P6"))
    counted = []
    for case in (single, half):
        tensors = case.inputs(CPU)
        counted.append(minimal_bytes(case, FORWARD, tensors, case.reference(tensors)))
    masks = 4 * 6 * 128 * 4 + 4 * 6 * 4
    assert counted[0] - masks == 2 * (counted[1] - masks)


def test_relative_error_is_that_of_the_norm_and_never_hides_a_nan():
    expected = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([3.0, 4.5]), expected) == pytest.approx(0.1)
    assert relative_error(torch.tensor([3.0, float("nan")]), expected) == float("inf")
    with pytest.raises(WrongResultError, match="shape"):
        relative_error(torch.zeros(3), expected)
    with pytest.raises(WrongResultError, match="1 results, wanted 2"):
        worst_error("few", [expected], [expected, expected], 1.0)


def test_a_measured_case_has_rows_of_both_passes_and_the_copy():
    found = list(measure_case(toy(Provider("twice", lambda t: (t["x"] + t["x"],))), CHOICE, SHORT))
    names = [(row.pass_name, row.implementation) for row in found]
    assert names == [(p, n) for p in (FORWARD, BOTH) for n in ("reference", "twice", COPY)]
    for row in found:
        assert row.p20_ms <= row.p50_ms <= row.p80_ms
        assert row.calls == 3
        assert row.peak_mib is None
    timed = {row.implementation: row for row in found if row.pass_name == FORWARD}
    assert timed[COPY].copy_fraction == 1.0
    assert timed["twice"].error == 0.0
    assert timed["twice"].gb_per_s == pytest.approx(48 / (1e6 * timed["twice"].p50_ms))
    assert timed["twice"].copy_fraction == pytest.approx(
        timed["twice"].gb_per_s / timed[COPY].gb_per_s
    )
    assert ratios(found)[timed["reference"]] == 1.0


@pytest.mark.parametrize("ours", [True, False])
def test_a_wrong_result_is_not_timed_and_raises_after_the_others(ours):
    wrong = Provider("wrong", lambda t: (2.001 * t["x"],), ours=ours)
    measured = []
    with pytest.raises(WrongResultError, match=r"double N6 forward: wrong: error 5\.0"):
        for row in measure_case(toy(wrong), CHOICE, SHORT):
            measured.append(row.implementation)
    assert measured == ["reference", COPY] * 2


def test_a_wrong_gradient_raises():
    wrong = Provider("wrong", lambda t: (t["x"] + t["x"].detach(),))
    with pytest.raises(WrongResultError, match=r"forward\+backward: wrong: .*result 1 of 2"):
        list(measure_case(toy(wrong), CHOICE, SHORT))


def fails(tensors):
    raise RuntimeError("no such instruction\nand more")


def test_who_cannot_run_is_listed_with_the_reason():
    absent = Provider("absent", doubled, unavailable="it is not installed")
    found = list(measure_case(toy(absent, Provider("broken", fails)), CHOICE, SHORT))
    notes = {row.implementation: row.note for row in found if row.p50_ms is None}
    assert notes == {
        "absent": "not measured: it is not installed",
        "broken": "not measured: failed: no such instruction",
    }


def test_a_failure_of_ours_is_not_passed_over():
    with pytest.raises(RuntimeError, match="no such instruction"):
        list(measure_case(toy(Provider("cpp", fails, ours=True)), CHOICE, SHORT))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("length", [0, 1, 63, 64, 4097, 100_003])
@pytest.mark.parametrize("offset", [0, 5])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_non_temporal_copy_copies_all_and_nothing_else(length, offset, threads):
    generator = torch.Generator().manual_seed(length)
    source = torch.randint(0, 255, (length + 16,), generator=generator, dtype=torch.uint8)
    target = torch.full((length + 32,), 255, dtype=torch.uint8)
    part = target[offset : offset + length]
    seconds = copy_nt(part, source[3 : 3 + length], threads)
    assert seconds >= 0.0
    assert torch.equal(part, source[3 : 3 + length])
    assert bool((target[:offset] == 255).all()) and bool((target[offset + length :] == 255).all())


def test_the_copy_refuses_tensors_of_other_sizes():
    with pytest.raises(ValueError, match="as many bytes"):
        copy_nt(torch.zeros(4), torch.zeros(5), 1)


def test_csv_has_the_columns_that_are_promised(tmp_path):
    path = tmp_path / "deep" / "rows.csv"
    measured = rows.Row("op", "cpp", FORWARD, "float32", "B1", 1.0, 2.0, 3.0, 2.5, 40.123456, 0.5)
    absent = rows.Row("op", "cuda", "", "", "", note="not measured: no GPU, none at all")
    rows.write_csv(path, [measured, absent], CONDITIONS)
    with path.open(newline="") as stream:
        header = next(csv.reader(stream))
    for name in (
        *("op", "implementation", "pass", "dtype", "shape", "p20_ms", "p50_ms", "p80_ms"),
        "launched_ms",
        *("gb_per_s", "copy_fraction", "peak_mib", "error", "device", "threads", "allocator"),
        *("torch", "triton", "cuda", "commit", "date", "note"),
    ):
        assert header.count(name) == 1
    first, second = rows.read_csv(path)
    assert (first["p50_ms"], first["gb_per_s"], first["peak_mib"]) == ("2", "40.12", "")
    assert first["device"] == second["device"] == "a, b"
    assert second["p50_ms"] == "" and second["note"] == "not measured: no GPU, none at all"
    assert [item.name for item in path.parent.iterdir()] == ["rows.csv"]
    path.write_text("op,other\n")
    with pytest.raises(ValueError, match="columns"):
        rows.read_csv(path)


def test_slug_is_a_file_name():
    assert rows.slug("NVIDIA H200 (x), 2 cores") == "nvidia-h200-x-2-cores"


FAMILIES = (bench_warp, bench_tps, bench_pool, bench_prototype, bench_conv, bench_distance)


@pytest.mark.parametrize("family", FAMILIES)
def test_cases_begin_with_the_reference_and_name_declared_operators(family):
    for case in family.cases(CHOICE):
        names = [provider.name for provider in case.providers]
        assert names[0] == "reference"
        assert len(set(names)) == len(names)
        assert {"cpp", "cuda", "triton"} <= set(names)
        assert case.op in family.OPERATORS and case.op in plot.FAMILIES[family.FAMILY]
        assert set(names) <= set(plot.COLOURS)


def test_rankers_are_compared_with_a_full_sort():
    (case,) = bench_ranking.cases(CHOICE)
    names = [provider.name for provider in case.providers]
    assert names == ["reference", "torch", "cpp"]
    assert case.op in bench_ranking.OPERATORS and case.op in plot.FAMILIES[bench_ranking.FAMILY]
    assert set(names) <= set(plot.COLOURS)
    tensors = case.inputs(CPU)
    wanted = case.reference(tensors)
    assert (wanted[2] > 0).any()
    for provider in case.providers[1:]:
        if provider.unavailable is None:
            for found, expected in zip(provider.run(tensors), wanted, strict=True):
                assert torch.equal(found, expected)


def test_loop_over_labels_is_right():
    (case,) = bench_prototype.cases(CHOICE)
    tensors = {n: t.double() if t.is_floating_point() else t for n, t in case.inputs(CPU).items()}
    torch.testing.assert_close(bench_prototype.loop_over_labels(tensors), case.reference(tensors))


def test_command_measures_writes_and_draws(tmp_path, capsys):
    path = tmp_path / "quick.csv"
    line = ["--quick", "--plain-allocator", "--only", "prototype", "--out", str(path)]
    assert command.main(line) == 0
    found = rows.read_csv(path)
    assert {row["op"] for row in found} == {"masked_prototype_loss"}
    assert any(row["implementation"] == "loop over labels" and row["p50_ms"] for row in found)
    assert any("left out" in row["note"] for row in found)
    assert "loop over labels" in capsys.readouterr().out
    assert plot.main([str(path), "--out", str(tmp_path / "figures")]) == 0
    picture = tmp_path / "figures" / "quick-prototype.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [item.name for item in picture.parent.iterdir()] == [picture.name]


def test_glance_compares_with_the_fastest_that_is_not_ours(tmp_path):
    op, shape, dtype = glance.LINES[0]
    times = {"reference": 8.0, "torch.compile": 6.0, "kornia": 9.0, "cpp": 3.0, "triton": 2.0}
    shared = {"op": op, "shape": shape, "dtype": dtype, "pass": glance.BOTH_PASSES}
    found = [shared | {"implementation": n, "p50_ms": str(ms)} for n, ms in times.items()]
    found += [row | {"pass": "forward", "p50_ms": "0.1"} for row in found]
    found += [shared | {"implementation": "cuda", "p50_ms": ""}]
    (line,) = glance.read_lines(found)
    assert line.ours == ("triton", 2.0) and line.other == ("torch.compile", 6.0)
    assert line.eager == 8.0 and line.gain == 3.0
    (line,) = glance.read_lines([r for r in found if r["implementation"] in ("reference", "cpp")])
    assert line.other is None and line.gain == 8.0 / 3.0
    without = [row for row in found if row["implementation"] != "reference"]
    picture = tmp_path / "glance.png"
    assert not glance.read_lines(without) and not glance.draw_glance(without, picture)
    about = {"device": "a processor", "torch": "2"}
    assert glance.draw_glance([row | about for row in found], picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("provider", "said"),
    [
        (Provider("wrong", lambda t: (t["x"],)), "WRONG: double N6"),
        (Provider("cpp", fails, ours=True), "FAILED: no such instruction"),
    ],
)
def test_command_reports_failures_by_its_status_and_goes_on(
    provider, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(bench_prototype, "cases", lambda choice: [toy(provider), toy()])
    monkeypatch.setattr(bench_prototype, "OPERATORS", ("double",))
    path = tmp_path / "quick.csv"
    line = ["--quick", "--plain-allocator", "--only", "double", "--out", str(path)]
    assert command.main(line) == 1
    assert said in capsys.readouterr().err
    assert [row["implementation"] for row in rows.read_csv(path)] == ["reference", COPY] * 4


def test_command_names_what_it_does_not_know(capsys):
    with pytest.raises(SystemExit):
        command.main(["--quick", "--plain-allocator", "--only", "nonsense"])
    assert "no nonsense; there are warp, warp_tokens" in capsys.readouterr().err
