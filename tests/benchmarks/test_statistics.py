"""The benchmark's statistics equal hand values, closed forms and scipy's."""

import json
import math

import numpy as np
import pytest
from benchmark_grids import TASK
from scipy import stats

from benchmarks.markdown import format_interval
from benchmarks.report.collect import CellRun, by_step
from benchmarks.study.mixed_model import Observation, fit_mixed_model
from benchmarks.study.statistics import bootstrap, first_reach, holm, median, t_interval, t_test, value_range


def test_a_target_is_reached_on_the_straight_line_between_two_evaluations():
    assert first_reach([0, 4, 8], [0.0, 0.2, 0.6], 0.4) == pytest.approx(6)
    assert first_reach([0, 4, 8], [0.0, 0.2, 0.6], 0.0) == 0
    assert first_reach([0, 4, 8], [0.0, 0.2, 0.6], 0.7) == math.inf


def test_a_curve_that_falls_again_has_reached_its_target():
    assert first_reach([0, 2, 4], [0.0, 1.0, 0.0], 0.5) == 1


def test_limits_of_a_mean_equal_scipys():
    x = np.random.default_rng(0).normal(3, 1, 5)
    interval, expected = t_interval(x.tolist()), stats.ttest_1samp(x, 0).confidence_interval()
    assert (interval.value, interval.low, interval.high) == pytest.approx((x.mean(), expected.low, expected.high))
    for few in ([1.0], [0.5, 1.5]):
        assert math.isnan(t_interval(few).low) and t_interval(few).value == 1.0
    assert math.isnan(t_interval([]).value)


def test_a_test_of_differences_equals_scipys_and_all_zeros_are_no_difference():
    d = np.random.default_rng(1).normal(0.3, 1, 6)
    assert t_test(d.tolist()) == pytest.approx(stats.ttest_1samp(d, 0).pvalue)
    assert t_test([0.0, 0.0, 0.0]) == 1
    assert math.isnan(t_test([1.0]))


def test_the_mean_with_a_run_that_diverged_is_nan_and_so_is_its_test():
    values = [1.0, 2.0, math.nan]
    for interval in (t_interval(values), value_range(values)):
        assert all(map(math.isnan, (interval.value, interval.low, interval.high)))
        assert format_interval(interval) == "-"
    assert math.isnan(t_test(values)) and holm([0.01, t_test(values)])[0] == pytest.approx(0.01)


def test_bootstrap_of_the_median_covers_it_and_narrows_with_the_number_of_seeds():
    x = np.random.default_rng(0).normal(3, 1, 201)
    wide, narrow = bootstrap(x[:11].tolist(), median), bootstrap(x.tolist(), median)
    assert wide.low < wide.value < wide.high
    assert narrow.value == np.median(x)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_the_median_of_times_counts_a_target_that_was_never_reached_as_late():
    interval = bootstrap([4.0, 6.0, math.inf], median)
    assert (interval.value, interval.low, interval.high) == (6.0, 4.0, math.inf)
    assert median(np.array([1.0, 2.0, math.inf, math.inf])) == math.inf  # half of them never reach it


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.01, math.nan, 0.03]) == pytest.approx([0.02, math.nan, 0.03], nan_ok=True)


def balanced(methods=3, blocks=8, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.normal(0, 0.5, (methods, blocks)) + rng.normal(0, 2, blocks) + np.arange(methods)[:, None]
    return y, [Observation(f"c{c}", "t", b, y[c, b]) for c in range(methods) for b in range(blocks)]


def test_mixed_model_of_balanced_data_equals_the_analysis_of_variance():
    """Closed study: effects are differences of means, s^2 is the interaction's mean square, limits are its t."""
    y, rows = balanced()
    model = fit_mixed_model(rows, "c0")
    residual = y - y.mean(0) - y.mean(1)[:, None] + y.mean()
    freedom = (3 - 1) * (8 - 1)
    s2 = (residual**2).sum() / freedom
    block = 3 * y.mean(0).var(ddof=1)  # expectation s^2 + 3 s_b^2
    assert model.residual_std == pytest.approx(math.sqrt(s2), rel=1e-2)
    assert model.block_std == pytest.approx(math.sqrt((block - s2) / 3), rel=2e-2)
    effect, reach = y[1].mean() - y[0].mean(), stats.t.ppf(0.975, freedom) * math.sqrt(2 * s2 / 8)
    assert model.effects["c1"].value == pytest.approx(effect)
    assert model.effects["c1"].high - effect == pytest.approx(reach, rel=1e-2)
    assert set(model.p) == {"c1", "c2"}


def test_mixed_model_without_blocks_that_differ_finds_no_block_variance():
    rng = np.random.default_rng(3)
    rows = [Observation(c, "t", b, rng.normal()) for c in ("a", "b") for b in range(40)]
    model = fit_mixed_model(rows, "a")
    assert model.block_std < 0.5
    assert model.residual_std == pytest.approx(1, abs=0.2)


def test_one_seed_gives_differences_without_limits():
    model = fit_mixed_model([Observation("a", "t", 0, 1.0), Observation("b", "t", 0, 3.0)], "a")
    assert model.effects["b"].value == pytest.approx(2)
    assert math.isnan(model.effects["b"].low)
    assert math.isnan(model.p["b"])


def test_mixed_model_uses_blocks_that_lack_a_method():
    """Dropping them would leave c1's effect to the five whole blocks."""
    y, rows = balanced()
    model = fit_mixed_model(rows[:-3], "c0")
    assert model.effects["c2"].low < 2 < model.effects["c2"].high
    whole = y[1, :5].mean() - y[0, :5].mean()
    every = y[1].mean() - y[0].mean()
    assert abs(model.effects["c1"].value - every) < 0.2 * abs(whole - every)


def test_a_method_of_one_task_is_not_credited_with_how_easy_the_task_is():
    """b exists in the easy task only, where it equals a; a's hard task is 5 lower."""
    rng = np.random.default_rng(1)
    rows = [
        Observation("a", task, seed, mean + rng.normal(0, 0.1))
        for task, mean in (("easy", 5), ("hard", 0))
        for seed in range(5)
    ]
    rows += [Observation("b", "easy", seed, 5 + rng.normal(0, 0.1)) for seed in range(5)]
    effect = fit_mixed_model(rows, "a").effects["b"]
    assert abs(effect.value) < 0.15 and effect.high - effect.low < 0.5


def test_effects_that_cannot_be_told_from_those_of_tasks_are_nan():
    rows = [Observation(m, "first", seed, 1.0 + seed) for m in ("ppo", "pcpo") for seed in range(3)]
    rows += [Observation("nft", "second", seed, 1.0 + seed) for seed in range(3)]
    model = fit_mixed_model(rows, "ppo")
    assert all(math.isnan(effect.value) for effect in model.effects.values()) and set(model.p) == {"pcpo", "nft"}


def test_metrics_by_step_join_runs_whose_windows_fell_on_other_steps(tmp_path):
    def run(name, steps, values):
        (tmp_path / name).mkdir()
        records = [
            {"update": n, "per_step": {"steps": [s], "grad_norm": [v]}}
            for n, (s, v) in enumerate(zip(steps, values, strict=True), 1)
        ]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
        return CellRun(TASK, "window", 0, {}, tmp_path / name)

    steps, means = by_step([run("a", [0, 1, 1], [1.0, 2.0, 4.0]), run("b", [1, 3], [5.0, 7.0])], "grad_norm")
    assert steps == [0, 1, 3] and means.tolist() == [1.0, 4.0, 7.0]
