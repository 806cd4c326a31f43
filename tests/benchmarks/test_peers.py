"""Our side of the comparison with public training scripts, and what is refused. The scripts need a clone to be run."""

import importlib.util
import sys

import pytest

from benchmarks.report.speed_page import speed_page
from benchmarks.speed.peer_scripts import PEERS, Finished, PeerSettings, SpeedMeter, module_of
from benchmarks.speed.peer_speed import PEER_RECIPES, peer_table, run_ours, spawn, write_peers
from trainer.config.schema import ConfigError

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
