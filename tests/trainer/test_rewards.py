"""Rewards of a headless run: their settings reach them, they leave their device, users' own are named in the file."""

import sys
import time

import pytest
import torch
from running import start_run

from comfyui_pcpo.reward import GroupReward, RewardError, RewardSettings
from comfyui_pcpo.reward.base import on_its_device
from comfyui_pcpo.reward.color import Colorfulness
from trainer.config.loading import dump, load
from trainer.config.schema import ConfigError
from trainer.loop.scoring import ImageGroups, Stopwatch, score
from trainer.runs.check import check_run
from trainer.runs.rewards import make_rewards

pytestmark = pytest.mark.slow

OWN = """
from comfyui_pcpo.reward import Reward

class Darkness(Reward):
    name = "darkness"
    needs_prompt = False

    def score_batch(self, images, prompts):
        return 1 - images.float().mean((1, 2, 3)) / 255
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's own on the path, with a reward in it."""
    (tmp_path / "my_rewards.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_rewards:Darkness"
    sys.modules.pop("my_rewards", None)


def test_the_configurations_settings_reach_every_reward(make_config, tmp_path):
    reward = {
        "held_out": ["hpsv2.1"],
        "folder": str(tmp_path), "device": "cpu", "precision": "float16", "images_at_once": 3,
    }  # fmt: skip
    rewards = make_rewards(make_config(reward=reward))
    assert list(rewards) == ["colorfulness", "hpsv2.1"]
    for found in rewards.values():
        assert found.settings == RewardSettings(tmp_path, "cpu", torch.float16, 3)


def test_rewards_go_where_the_model_is_unless_told_otherwise(make_config):
    assert make_rewards(make_config())["colorfulness"].device.type == "cpu"
    with pytest.raises(ConfigError, match=r"reward.device toaster is not a device"):
        make_rewards(make_config(reward={"device": "toaster"}))


def test_a_prompt_that_a_reward_cannot_score_is_refused_before_the_run_begins(make_config, tmp_path):
    config = make_config(prompts={"lines": ["a fox", "a zebra"]}, reward={"held_out": ["tinyeval"]})
    with pytest.raises(ConfigError, match="reward tinyeval: 'a zebra' is not a prompt"):
        start_run(config)
    assert not (tmp_path / "run").exists()
    assert [problem for problem in check_run(config).problems if "'a zebra' is not a prompt" in problem]
    assert not check_run(make_config(prompts={"lines": ["a fox"]}, reward={"held_out": ["tinyeval"]})).problems


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a computer without a GPU")
def test_a_gpu_that_is_elsewhere_is_a_note_of_the_check(make_config):
    check = check_run(make_config(model={"device": "cuda"}))
    assert check.problems == [] and check.budget is not None
    assert check.notes == ["model.device is cuda, but PyTorch finds no GPU; training needs one"]


def test_an_absent_weight_file_is_named_before_the_folder_is_made(make_config, tmp_path):
    config = make_config(reward={"held_out": ["hpsv2.1"], "folder": str(tmp_path / "weights")})
    with pytest.raises(RewardError, match=r"weights.HPSv2.HPS_v2.1_compressed.pt does not exist"):
        start_run(config)
    assert not (tmp_path / "run").exists()


def test_the_weight_folder_is_relative_to_the_file_that_names_it(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('[reward]\nfolder = "weights"\n', encoding="utf-8")
    config = load(file)
    assert config.reward.folder == tmp_path.resolve() / "weights"
    file.write_text(dump(config), encoding="utf-8")
    assert load(file) == config


def test_a_reward_leaves_its_device_between_rollouts_only_when_asked():
    reward = Colorfulness(RewardSettings(device="meta"))
    for leaves, after in ((True, "cpu"), (False, "meta"), (True, "cpu")):
        with on_its_device(reward, leaves):
            assert reward.device.type == "meta"
        assert reward.device.type == after


def test_a_reward_that_raises_leaves_its_device_too():
    reward = Colorfulness(RewardSettings(device="meta"))
    with pytest.raises(ZeroDivisionError), on_its_device(reward, True):
        raise ZeroDivisionError
    assert reward.device.type == "cpu"


class Slow(Colorfulness):
    def score_batch(self, images, prompts):
        time.sleep(0.2)
        return super().score_batch(images, prompts)


def test_every_rewards_seconds_are_told_apart():
    clock = Stopwatch()
    score({"slow": Slow(), "quick": Colorfulness()}, ImageGroups(torch.rand(2, 4, 4, 3), [""] * 2, 2), clock)
    assert clock.seconds["slow"] >= 0.2 > clock.seconds["quick"]


def test_a_run_on_a_reward_of_the_users_own_records_it_under_its_name(make_config, module):
    config = make_config(reward={"weights": {module: 1.0}}, run={"updates": 1})
    folder, updates = start_run(config)
    list(updates)
    (record,) = folder.records()
    assert set(record["rewards"]) == set(record["seconds_rewards"]) == {module, "colorfulness"}
    assert sum(record["seconds_rewards"].values()) <= record["seconds_reward"] + 1e-3
    assert folder.config() == config


def test_a_module_without_that_reward_is_refused(make_config, module):
    with pytest.raises(ConfigError, match=r"module:Class"):
        make_rewards(make_config(reward={"weights": {module + "er": 1.0}}))


class Rank(GroupReward):
    """How many images of the group are less colourful; records the size of each group."""

    name = "rank"

    def __init__(self):
        super().__init__()
        self.sizes = []

    def score_group(self, images, prompt):
        self.sizes.append(len(images))
        scores = Colorfulness().score_batch(images, [prompt] * len(images))
        return (scores[:, None] > scores).sum(1)


def test_a_group_reward_trains_on_groups_even_if_they_share_a_prompt(make_config, learn):
    config = make_config(
        prompts={"lines": ["a fox"]}, rollout={"prompts_per_update": 2, "group_size": 4}, run={"updates": 1}
    )
    rank = Rank()
    _, updates = learn(config, rewards={"colorfulness": rank})
    assert rank.sizes == []
    (update,) = updates
    assert rank.sizes == [4, 4]
    assert [sorted(group.tolist()) for group in update.scores.split(4)] == [[0, 1, 2, 3]] * 2
