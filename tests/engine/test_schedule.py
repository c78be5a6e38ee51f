"""The learning rate: start and end of the warm-up, the cosine by iterations and by epochs."""

from __future__ import annotations

import math

import pytest

from gsalign.engine.config import OptimizerConfig, ScheduleConfig
from gsalign.engine.schedule import LtpsFactor, Rise, Schedule

PEAK = 0.008


def schedule(total: int = 100, epoch_length: int = 10, **settings: object) -> Schedule:
    config = ScheduleConfig(**{"warmup": 20, "minimum": 1e-4, "step": "iteration", **settings})
    return Schedule(config, PEAK, total, epoch_length)


def test_the_warm_up_rises_in_a_line_from_its_start_to_the_peak():
    rate = schedule(warmup_start=0.01)
    assert rate(0) == pytest.approx(0.01 * PEAK)
    assert rate(10) == pytest.approx((0.01 + 0.99 * 0.5) * PEAK)
    assert rate(19) == pytest.approx((0.01 + 0.99 * 0.95) * PEAK)
    assert rate(20) == pytest.approx(PEAK)
    steps = [rate(i + 1) - rate(i) for i in range(20)]
    assert steps == pytest.approx([steps[0]] * 20)


def test_the_cosine_by_iterations_passes_half_way_and_ends_at_the_minimum():
    rate = schedule()
    assert rate(60) == pytest.approx(1e-4 + (PEAK - 1e-4) / 2)
    assert rate(40) == pytest.approx(1e-4 + (PEAK - 1e-4) * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rate(100) == pytest.approx(1e-4)
    assert rate(1000) == pytest.approx(1e-4)
    values = [rate(i) for i in range(20, 100)]
    assert values == sorted(values, reverse=True) and values[-1] > 1e-4


def test_the_cosine_by_epochs_moves_at_the_start_of_each_epoch_only():
    # The warm-up ends within the third epoch, so the cosine starts with the fourth.
    rate = schedule(warmup=25, step="epoch")
    assert {rate(i) for i in range(25, 40)} == {PEAK}
    lengths = [{rate(i) for i in range(10 * epoch, 10 * epoch + 10)} for epoch in range(3, 10)]
    assert all(len(values) == 1 for values in lengths)
    wanted = [1e-4 + (PEAK - 1e-4) * 0.5 * (1 + math.cos(math.pi * done / 7)) for done in range(7)]
    assert [values.pop() for values in lengths] == pytest.approx(wanted)


def test_a_warm_up_below_one_is_a_share_of_the_run():
    assert schedule(total=200, warmup=0.1).warmup == 20
    assert schedule(total=200, warmup=0.1)(0) == pytest.approx(0.01 * PEAK)
    assert schedule(total=200, warmup=1).warmup == 1


def test_without_warm_up_the_run_starts_at_the_peak():
    assert schedule(warmup=0)(0) == pytest.approx(PEAK)


def test_constant_stays_at_the_peak_after_the_warm_up():
    rate = schedule(name="constant")
    assert rate(0) == pytest.approx(0.01 * PEAK)
    assert {rate(i) for i in range(20, 100)} == {PEAK}


@pytest.mark.parametrize("step", ["epoch", "iteration"])
def test_a_run_that_ends_before_its_warm_up_does_never_leave_it(step):
    rate = schedule(total=10, warmup=20, step=step)
    values = [rate(i) for i in range(10)]
    assert values == sorted(values)
    assert values[-1] < PEAK / 2
    assert rate(20) == pytest.approx(PEAK)


def test_a_minimum_above_the_peak_never_raises_the_rate():
    rate = schedule(minimum=1.0)
    assert max(rate(i) for i in range(101)) == pytest.approx(PEAK)


def test_the_factor_of_ltps_rises_in_a_line_and_stays():
    factor = LtpsFactor(OptimizerConfig(ltps_lr_factor=0.5, ltps_warmup=20), total=100)
    assert [factor(i) for i in (0, 10, 20, 99)] == [0.0, 0.25, 0.5, 0.5]


def test_the_warmup_of_ltps_may_be_a_share_of_the_run():
    factor = LtpsFactor(OptimizerConfig(ltps_warmup=0.1), total=100)
    assert [factor(i) for i in (0, 5, 10)] == [0.0, 0.5, 1.0]


def test_without_settings_of_its_own_ltps_learns_at_the_rate_of_all():
    assert {LtpsFactor(OptimizerConfig(), total=100)(i) for i in range(100)} == {1.0}


@pytest.mark.parametrize(("length", "end"), [(20, 20), (0.5, 50), (1, 1), (200, 200)])
def test_a_rise_goes_in_a_line_from_0_to_1_and_stays(length, end):
    rise = Rise(length, total=100)
    assert [rise(0), rise(end), rise(end + 1), rise(10**6)] == [0.0, 1.0, 1.0, 1.0]
    assert [rise(i) for i in range(end)] == pytest.approx([i / end for i in range(end)])


def test_a_rise_of_no_length_is_1_throughout():
    assert {Rise(0.0, total=100)(i) for i in range(100)} == {1.0}
