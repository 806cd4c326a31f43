"""Claims about curves of runs: what is drawn for complete, short and broken records, and how fast."""

import math
import time

import numpy as np
import pytest

from comfyui_pcpo.plotting import run_curves
from comfyui_pcpo.plotting.panels import PANEL_SIZE


def record(update: int, **changes: object) -> dict:
    table = {"steps": [0, 1, 2], "clip_fraction": [0.1, 0.2, 0.3], "grad_norm": [1.0, 0.5, 0.25]}
    seconds = {"seconds_rollout": 1.0, "seconds_reward": 0.5, "seconds_update": 1.5}
    values = {"update": update, "reward_mean": 0.1 * update, "reward_std": 0.2, "rewards": {"jpeg": 0.1 * update}}
    return (
        values | seconds | {"held_out": {"align": 0.3}, "clip_fraction": 0.2, "kl": 1e-4, "per_step": table} | changes
    )


def test_smoothing_keeps_a_constant_and_skips_nan():
    smoothed = run_curves.smooth([2.0, 2.0, math.nan, 2.0], 0.9)
    np.testing.assert_allclose(smoothed, [2.0, 2.0, math.nan, 2.0])
    assert run_curves.smooth([1.0, 5.0], 0.0) == [1.0, 5.0]
    assert run_curves.smooth([1.0, 2.0], 0.5)[1] == pytest.approx((0.25 * 1 + 0.5 * 2) / 0.75)


def test_smoothing_of_one_is_refused():
    with pytest.raises(ValueError, match=r"smoothing is 1, but must be at least 0 and below 1"):
        run_curves.smooth([1.0], 1)


@pytest.mark.parametrize("count", [1, 2, 30])
def test_curves_draw_a_run_of_any_length(count: int):
    assert run_curves.curves([record(k + 1) for k in range(count)]).size == (2 * PANEL_SIZE[0], 2 * PANEL_SIZE[1])


def test_curves_draw_records_with_missing_and_failed_values():
    broken = [{"update": 1}, record(2, reward_mean=math.nan, kl=None, per_step={}), record(3, held_out={})]
    assert run_curves.curves(broken).size == (2 * PANEL_SIZE[0], 2 * PANEL_SIZE[1])


def test_the_reward_panel_shows_values_their_mean_with_its_spread_and_held_out_rewards():
    (panel,) = run_curves.curve_panels([record(k) for k in (1, 2, 3)], 0.0, ("reward",))
    (line,) = panel.lines
    assert line.label == "jpeg" and line.x == [1, 2, 3]
    np.testing.assert_allclose(line.y, [0.1, 0.2, 0.3])
    assert line.low is not None
    np.testing.assert_allclose(line.low, [-0.1, 0.0, 0.1], atol=1e-12)
    assert [(held_out.label, held_out.y) for held_out in panel.right] == [("align (held out)", [0.3, 0.3, 0.3])]
    assert panel.note == "3 updates in 9 s"


def test_several_rewards_have_a_panel_each():
    rows = [record(k, rewards={"jpeg": 1.0, "align": 0.2}) for k in range(3)]
    titles = [panel.title for panel in run_curves.curve_panels(rows, 0.6, ("reward",))]
    assert titles == ["Reward", "Reward: jpeg", "Reward: align"]


def test_the_per_step_numbers_are_the_mean_of_the_last_quarter():
    rows = [record(k, per_step={"steps": [0, 4], "clip_fraction": [k, 1.0]}) for k in range(8)]
    assert run_curves.per_step(rows, "clip_fraction") == ([0, 4], [6.5, 1.0])


def test_per_step_joins_steps_that_differ_from_update_to_update():
    rows = [
        record(1, per_step={"steps": [0, 1], "kl": [1.0, 2.0]}),
        record(2, per_step={"steps": [1, 2], "kl": [4.0, None]}),
    ]
    steps, values = run_curves.per_step(rows * 4, "kl")
    assert steps == [0, 1, 2]
    np.testing.assert_allclose(values, [1.0, 3.0, math.nan])


@pytest.mark.parametrize("draw", [run_curves.curves, lambda rows: run_curves.compare_runs({"cats": rows})])
def test_a_run_without_records_is_refused(draw):
    with pytest.raises(ValueError, match=r"has no records to plot. Train for one update first"):
        draw([])


def test_an_unknown_panel_is_refused_by_name():
    with pytest.raises(ValueError, match=r"panel 'rewrd' is not one of reward, clip, kl, per_step"):
        run_curves.curves([record(1)], panels=("rewrd",))


def test_panels_with_nothing_to_see_are_left_out_unless_they_are_asked_for():
    table = {"steps": [0, 1], "clip_fraction": [0.0, 0.0], "grad_norm": [1.0, 0.5]}
    rows = [record(k, clip_fraction=0.0, kl=1e-4 if k == 2 else None, per_step=table) for k in (1, 2, 3)]
    panels = run_curves.curve_panels(rows, 0.6, tuple(run_curves.PANELS))
    assert [panel.title for panel in panels] == ["Reward", "Per denoising step"]
    assert panels[1].y_label == "gradient norm" and not panels[1].bars and not panels[1].right
    assert [panel.title for panel in run_curves.curve_panels(rows, 0.6, ("kl",))] == ["KL to the reference"]
    titles = [panel.title for panel in run_curves.curve_panels(rows, 0.6, ("clip", "kl"))]
    assert titles == ["Clip fraction", "KL to the reference"]
    titles = [panel.title for panel in run_curves.comparison_panels({"a": rows, "b": rows}, 0.6)]
    assert "Clip fraction" not in titles and "Clip fraction per step" in titles


def test_a_run_without_a_guard_has_an_empty_guard_panel_only_where_it_is_asked_for():
    for count in (1, 3):
        rows = [record(k + 1) for k in range(count)]
        (panel,) = run_curves.curve_panels(rows, 0.6, ("guard",))
        assert panel.title == "Guard" and not panel.all_lines() and panel.note == "no measurements"
        assert run_curves.curves(rows, panels=("guard",)).size == PANEL_SIZE
        titles = [panel.title for panel in run_curves.curve_panels(rows, 0.6, tuple(run_curves.PANELS))]
        assert "Guard" not in titles and "Reward" in titles


def test_no_panel_at_all_is_refused_with_the_names_of_all():
    with pytest.raises(ValueError, match=r"No panels given\. Name at least one of reward, clip, kl, per_step, guard\."):
        run_curves.curves([record(1)], panels=())


def test_compared_runs_keep_one_colour_each_in_every_panel():
    runs = {name: [record(k) for k in range(1, n)] for name, n in (("a", 9), ("b", 5))}
    panels = run_curves.comparison_panels(runs, 0.6)
    assert len(panels) == 6
    for panel in panels:
        assert {line.label: line.color for line in panel.lines if line.label} == {"a": 0, "b": 1}
    assert run_curves.compare_runs(runs).size == (2 * PANEL_SIZE[0], 3 * PANEL_SIZE[1])


def test_the_live_preview_of_a_hundred_updates_is_drawn_fast_and_at_its_size():
    rows = [record(k) for k in range(1, 101)]
    run_curves.curves(rows, panels=("reward",))  # imports matplotlib
    times = []
    for _ in range(5):
        start = time.process_time()
        image = run_curves.curves(rows, panels=("reward",), size=(540, 324))
        times.append(time.process_time() - start)
    assert image.size == (540, 324)
    assert min(times) < 0.3  # 0.08 s on one idle core
