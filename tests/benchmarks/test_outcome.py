"""Outcomes of a run by hand: gains at a limit, prices of a gain, and what a guard keeps."""

import math

import pytest
from benchmark_grids import evaluations

from benchmarks.study.cells import diverged
from benchmarks.study.guarded import GuardOutcome, guard_outcome
from benchmarks.study.outcome import (
    at_distance,
    at_limits,
    at_lost_diversity,
    distance,
    gain,
    gain_at_price,
    gain_within_limits,
    gains,
    gains_within_limits,
    lost_diversity,
    price,
    tinyeval_curve,
)
from trainer.config.guard_section import GuardConfig

REWARD = "colorfulness"


def with_diversity(*left: float, gain: float = 2.0):
    """Evaluations with these shares of the base model's diversity."""
    rows = evaluations(gain)
    return [{**row, "diversity": 0.2 * share} for row, share in zip(rows, left, strict=True)]


def test_the_gain_is_read_where_diversity_has_fallen_by_a_tenth():
    """Gains 0, 1, 2; diversity 1, 0.95, 0.85: the limit lies halfway between the last two evaluations."""
    rows = with_diversity(1, 0.95, 0.85)
    assert gains(rows, REWARD) == pytest.approx([0, 1, 2])
    assert lost_diversity(rows) == pytest.approx([0, 0.05, 0.15])
    assert gain_within_limits(rows, REWARD) == pytest.approx(1.5)


def test_the_first_of_both_limits_ends_the_gain():
    """Diversity would end it at 1.5, the distance of 1.5 ends it at 1 of 2, and destroyed images may gain diversity."""
    rows = [{**row, "fd_base": fd} for row, fd in zip(with_diversity(1, 0.95, 0.85), (100, 150, 400), strict=True)]
    assert at_lost_diversity(rows, gains(rows, REWARD)) == pytest.approx(1.5)
    assert gain_within_limits(rows, REWARD) == pytest.approx(1)
    assert gain_within_limits(evaluations(2.0, diversity=1.5, distance=5.0), REWARD) == pytest.approx(0.25)


def test_the_curve_within_limits_is_level_from_the_limit_on():
    rows = evaluations(2.0, diversity=0.6)
    assert gains_within_limits(rows, REWARD) == pytest.approx([0, 0.5, 0.5])
    assert gains_within_limits(evaluations(2.0), REWARD) == pytest.approx([0, 1, 2])


def test_a_run_that_keeps_its_diversity_counts_with_its_last_gain():
    assert gain_within_limits(with_diversity(1, 1.1, 0.91), REWARD) == pytest.approx(2)
    assert gain_within_limits(evaluations(-0.3), REWARD) == pytest.approx(-0.3)


def test_a_run_that_diverged_counts_with_its_last_gain_and_has_lost_everything_else():
    """Gains 0 and 1 at 0 and 1,000 model evaluations, then NaN: nothing is read beyond the last evaluation."""
    sound = evaluations(2.0, distance=1.2, hard=0.6)[:2]
    rows = diverged(sound, [5, 10, 15])
    assert [row["update"] for row in rows] == [0, 5, 10, 15]
    assert lost_diversity(rows) == pytest.approx([0, 0, 1, 1])
    for curve in (distance(rows), gains(rows, REWARD), tinyeval_curve(rows), [row["right"] for row in rows]):
        assert all(map(math.isfinite, curve[:2])) and all(map(math.isnan, curve[2:]))
    assert gain_within_limits(rows, REWARD) == at_distance(rows, gains(rows, REWARD)) == pytest.approx(1)
    assert at_lost_diversity(rows, gains(rows, REWARD)) == pytest.approx(1)
    assert at_limits(rows, tinyeval_curve(rows)) == pytest.approx(0.55)
    assert gains_within_limits(rows, REWARD) == pytest.approx([0, 1, 1, 1])
    assert [gain_at_price(rows, REWARD, spent) for spent in (500, 9000)] == pytest.approx([0.5, 1])
    assert price(rows, REWARD, 0.5, "model_evaluations") == pytest.approx(500)
    assert price(rows, REWARD, 1.5, "model_evaluations") == math.inf


def test_diversity_that_returns_does_not_undo_its_loss():
    assert gain_within_limits(with_diversity(1, 0.8, 1), REWARD) == pytest.approx(0.5)


def test_the_gain_at_a_distance_is_read_where_it_is_reached():
    """1, 1.5, 2 times the base model's distance."""
    rows = evaluations(2.0, distance=2.0)
    assert at_distance(rows, gains(rows, REWARD), 1.5) == pytest.approx(1)
    assert at_distance(rows, gains(rows, REWARD), 1.25) == pytest.approx(0.5)
    assert at_distance(rows, gains(rows, REWARD), 3) == pytest.approx(2)


def test_the_gain_at_a_price_is_that_within_the_limits():
    """Gains 0, 1, 2 after 0, 1,000 and 2,000 model evaluations; the limit is reached after 1,500."""
    rows = with_diversity(1, 0.95, 0.85)
    found = [gain_at_price(rows, REWARD, spent) for spent in (0, 500, 2000, 9000)]
    assert found == pytest.approx([0, 0.5, 1.5, 1.5])


def test_a_gain_costs_what_is_spent_until_it_is_reached():
    rows = evaluations(2.0)  # 2 in 10 updates
    assert price(rows, REWARD, 0.5, "model_evaluations") == pytest.approx(500)
    assert price(rows, REWARD, 0.5, "images") == pytest.approx(40)
    assert price(rows, REWARD, 0.5, "cpu_seconds") == pytest.approx(5)
    assert price(rows, REWARD, 2.5, "images") == math.inf


@pytest.mark.parametrize("rows", [with_diversity(1, 0.8, 1), evaluations(2.0, distance=5.0)])
def test_a_gain_beyond_the_limits_has_no_price(rows):
    """Diversity leaves its limit at a gain of 0.5; the distance of 1.5 is reached at a gain of 0.25."""
    assert price(rows, REWARD, 0.2, "images") == pytest.approx(16)
    assert price(rows, REWARD, 0.6, "images") == math.inf


def test_tinyeval_is_read_like_any_curve():
    rows = evaluations(2.0, diversity=0.8, hard=0.6)
    assert tinyeval_curve(rows) == tinyeval_curve(rows, "counting") == pytest.approx([0.5, 0.55, 0.6])
    assert at_limits(rows, tinyeval_curve(rows)) == pytest.approx(0.55)


def test_a_gain_has_a_unit_where_the_base_models_images_all_score_alike():
    def row(mean, std):
        return {"tinyeval": mean, "tinyeval_std": std}

    assert gain(row(0.75, 0.5), row(1.0, 0.25), "tinyeval") == pytest.approx(-1)  # of the base model's deviation
    assert gain(row(0.75, 0.5), row(1.0, 0.0), "tinyeval") == pytest.approx(-0.5)
    assert gain(row(0.0, 0.0), row(1.0, 0.0), "tinyeval") == pytest.approx(-1)


def measured(update: int, reward: float, lost: float):
    return {"update": update, "guard": {"reward": reward, "lost": {"polish": lost}, "model_evaluations": 7}}


def test_a_guard_keeps_what_it_kept_when_it_would_have_stopped():
    """Update 20 is back within the limits, with the highest reward, but a stopped run never comes to it."""
    records = [
        {"update": 1},
        measured(5, 1.0, 0.1),
        measured(10, 2.0, 3.0),
        measured(15, 3.0, 3.0),
        measured(20, 4.0, 0.0),
    ]
    stopping = GuardConfig(every=5, patience=2, tolerance=0.5)
    assert guard_outcome(records, stopping) == GuardOutcome(kept=5, stopped=15, model_evaluations=28)
    patient = stopping.model_copy(update={"patience": 3})
    assert guard_outcome(records, patient) == GuardOutcome(kept=20, stopped=None, model_evaluations=35)
    assert guard_outcome(records[2:3], patient).kept is None
