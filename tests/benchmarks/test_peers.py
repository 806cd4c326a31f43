"""Speed of our loop beside its bare model calls and beside public training scripts, which need a clone to be run."""

import importlib.util
import json
import sys

import pytest

from benchmarks.report.speed_page import axis_points, speed_page
from benchmarks.speed import loop_speed, peer_speed
from benchmarks.speed.loop_speed import AXES, SPEED_MODELS, measure_loop, point_config, point_file, speed_points
from benchmarks.speed.peer_scripts import PEERS, Finished, PeerSettings, SpeedMeter, module_of
from benchmarks.speed.peer_speed import (
    PEER_RECIPES,
    compare_with_peers,
    on_gpu,
    peer_table,
    run_ours,
    spawn,
    write_peers,
)
from trainer.config.schema import ConfigError
from trainer.loop.plan import chunked

pytestmark = pytest.mark.slow

SMALL = PeerSettings(batches=2, images=2, steps=3, updates=1)


@pytest.mark.parametrize(("name", "trained"), [("ddpo-pytorch", 3), ("flow_grpo", 2)])
def test_our_side_makes_the_model_calls_of_the_script(name, trained):
    """Each image is predicted once per step in the rollout and once per trained step, the last one only for DDPO."""
    result = run_ours(name, SMALL).result()
    assert result["evaluations_per_image"] == 3 + trained
    assert result["images_per_second"] > 0 < result["images_per_cpu_second"]


def test_a_meter_measures_whole_updates_after_the_first():
    meter = SpeedMeter(SMALL)
    with pytest.raises(Finished):
        for _ in range(100):
            meter.mark()
            meter.rows += 5
    assert len(meter.marks) == 2 * 2 + 1
    assert meter.result()["evaluations_per_image"] == 2 * 5 / (2 * 2)


def test_a_stand_in_is_found_like_an_installed_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "a_tracker", module_of("a_tracker", init=len))
    assert importlib.util.find_spec("a_tracker") is not None


def test_a_folder_without_the_script_is_refused(tmp_path):
    assert PEERS.keys() == PEER_RECIPES.keys()
    with pytest.raises(ConfigError, match=r"flow_grpo could not be measured: .* has no scripts/train_sd3.py"):
        spawn("flow_grpo", tmp_path, SMALL)


def row(peer: str, ratio: float) -> dict:
    rates = {"images_per_second": 2.0, "evaluations_per_second": 30.0, "images_per_cpu_second": 4.0}
    side = rates | {"evaluations_per_image": 15.0}
    return {"peer": peer, "ours": side, "theirs": side, "ratio": ratio}


def test_a_peer_is_added_to_those_measured_before_and_reported(tmp_path):
    file = tmp_path / "peers.json"
    write_peers([row("ddpo-pytorch", 1.25), row("flow_grpo", 1.5)], file)
    write_peers([row("flow_grpo", 2.0)], file)
    page = speed_page(tmp_path, tmp_path, "images")
    assert page.count("| ddpo-pytorch |") == page.count("| flow_grpo |") == 1
    assert "| 1.25 |" in page and "| 2.00 |" in page and "| 1.50 |" not in page


def test_the_table_shows_both_sides_and_their_ratio():
    text = peer_table([row("flow_grpo", 1.25)])
    assert "| flow_grpo | 2.00 | 30.00 | 4.00 | 15.00 | 1.00 |" in text
    assert "| ours | 2.00 | 30.00 | 4.00 | 15.00 | 1.25 |" in text


def test_the_relative_speed_is_the_median_of_ours_over_theirs_in_each_round(tmp_path, monkeypatch):
    speeds = {None: iter([4.0, 9.0, 10.0]), tmp_path: iter([2.0, 3.0, 10.0])}  # ratios 2, 3 and 1
    turns = []

    def measured(name, clone, settings):
        turns.append(clone)
        return dict.fromkeys(row("flow_grpo", 1)["ours"], 1.0) | {"images_per_second": next(speeds[clone])}

    monkeypatch.setattr(peer_speed, "spawn", measured)
    said = []
    rows = compare_with_peers({"flow_grpo": tmp_path}, SMALL, 3, said.append)
    assert turns == 3 * [None, tmp_path] and len(said) == 3
    text = peer_table(rows)
    assert "| flow_grpo | 3.00 | 1.00 | 1.00 | 1.00 | 1.00 |" in text
    assert "| ours | 9.00 | 1.00 | 1.00 | 1.00 | 2.00 |" in text


def test_a_row_of_any_gpu_says_so_and_one_without_a_device_is_of_a_cpu():
    assert [bool(on_gpu(one)) for one in ({"device": "cuda:1"}, {"device": "cpu"}, {})] == [True, False, False]


def test_every_setting_of_the_loop_is_measured_once():
    sizes = set()
    for model, axis, value in speed_points():
        config = point_config(model, axis, value)
        calls = [len(rows) for minibatch in chunked(config, config.rollout.prompts_per_update) for rows in minibatch]
        sizes.add((model, config.rollout.steps, config.rollout.height, *calls))
        if axis == "images_at_once":
            assert set(calls) == {value}
    assert len(sizes) == len(speed_points()) == 2 * 9


def test_the_base_is_on_every_axis():
    rows = [{"axis": axis, "value": value} for model, axis, value in speed_points() if model == "emoji-flow"]
    for axis, values in AXES.items():
        assert tuple(value for value, _ in axis_points(rows, axis)) == values


def test_the_parts_of_an_update_sum_to_the_whole(monkeypatch):
    monkeypatch.setattr(loop_speed, "REPEATS", 1)
    small = {"prompts_per_update": 1, "group_size": 2, "steps": 3, "height": 64, "width": 64}
    monkeypatch.setattr(loop_speed, "BASE", {**loop_speed.BASE, **small})
    result = measure_loop(point_config("emoji-flow", "images_at_once", 1))
    parts = [result[name] for name in ("rollout", "reward", "update")]
    assert min(parts) > 0 and sum(parts) == pytest.approx(result["whole"])
    assert result["outside"] == pytest.approx((result["whole"] - result["least"]) / result["whole"])
    assert result["images"] == 2 and result["transitions"] == 2 * 2
    assert result["peak"] >= result["loaded"] > 0


def test_the_page_shows_each_row_of_the_loop_with_its_commit(tmp_path):
    """0.8 s for 16 images are 50 ms each, 2.24 s for 112 transitions 20 ms; 0.1 of 4 s is 2.5 %."""
    (tmp_path / "speed").mkdir()
    measured = {"rollout": 0.8, "update": 2.24, "whole": 4.0, "least": 3.9, "outside": 0.025,
                "images": 16, "transitions": 112, "peak": 812.0, "loaded": 700.0}  # fmt: skip
    for commit, point in (("aaa", ("emoji-flow", "steps", 8)), ("bbb", ("emoji-flow", "pixels", 64))):
        content = dict(zip(("model", "axis", "value"), point, strict=True)) | {"commit": commit} | measured
        point_file(tmp_path / "speed", point).write_text(json.dumps(content))
    page = speed_page(tmp_path, tmp_path, "images")
    assert "Commit aaa, bbb." in page and "median 2.5 %, from 2.5 to 2.5 %" in page
    for label in ("base", "pixels per side 64"):
        assert f"| emoji-flow | {label} | 50.0 | 20.0 | 2.5 % | 812 MB (+112) |" in page


def test_a_measurement_keeps_its_commit_and_one_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(loop_speed, "measure_loop", lambda config: {"whole": config.rollout.steps})
    monkeypatch.setattr(loop_speed, "commit", lambda: "aaa")
    file = tmp_path / "row.json"
    loop_speed.measure_point(SPEED_MODELS[0], "steps", 4, file)
    found = json.loads(file.read_text())
    assert found["commit"] == "aaa" and found["whole"] == found["value"] == 4
    with pytest.raises(ConfigError, match="no-model with steps 4 could not be measured: it exited with status 1"):
        loop_speed.spawn_measurement(tmp_path, ("no-model", "steps", 4))
