"""Rewards of the user's own: one folder, installed packages, module:Class; names and nothing else from workflows."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import comfyui_pcpo
from comfyui_pcpo.reward import CLASSES, REWARDS, Reward, RewardError, available, import_reward, load_reward, offered
from comfyui_pcpo.reward.jpeg import JpegCompressibility
from comfyui_pcpo.reward.user import load_file

GOOD = """
from comfyui_pcpo.reward import Reward

class Darkness(Reward):
    name = "{name}"
    needs_prompt = False

    def score_batch(self, images, prompts):
        return 1 - images.float().mean((1, 2, 3)) / 255
"""


def write(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_a_file_in_the_folder_is_a_reward(tmp_path):
    write(tmp_path, "dark.py", GOOD.format(name="darkness"))
    write(tmp_path, "_draft.py", "raise RuntimeError")
    reward = load_reward("darkness", user_folder=tmp_path)
    assert reward.score(torch.ones(1, 4, 4, 3), [""]).item() == 0
    assert set(available(tmp_path)) == {*REWARDS, "darkness"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD.format(name="alignment"), "already exists"),
        (GOOD.format(name=""), "must define both `name` and `score_batch`"),
        ("x = 1", "defines no reward"),
        ("1 / 0", "ZeroDivisionError"),
        ("def (", "SyntaxError"),
    ],
)
def test_a_file_that_is_no_reward_is_named(text, said, tmp_path):
    with pytest.raises(RewardError, match=said):
        available(write(tmp_path, "mine.py", text))


def test_a_reward_of_which_less_is_better_is_told_to_turn_its_sign(tmp_path):
    text = GOOD.format(name="darkness").replace("needs_prompt = False", "higher_is_better = False")
    with pytest.raises(RewardError, match="darkness sets higher_is_better = False, but a higher score is"):
        load_reward("darkness", user_folder=write(tmp_path, "dark.py", text))


def test_a_reward_lacks_the_method_that_its_kind_asks_for(tmp_path):
    for base, method in (("GroupReward", "score_group"), ("EndpointReward", "score_image")):
        text = f"from comfyui_pcpo.reward.user import {base}\nclass Mine({base}):\n    name = 'mine'\n"
        with pytest.raises(RewardError, match=f"Mine must define both `name` and `{method}`"):
            available(write(tmp_path, "mine.py", text))


def test_a_nameless_class_that_rewards_of_the_file_share_is_none_of_them(tmp_path):
    text = GOOD.format(name="").replace("Darkness", "Shared") + "\nclass Mine(Shared):\n    name = 'mine'\n"
    assert set(available(write(tmp_path, "mine.py", text))) == {*REWARDS, "mine"}


def test_a_file_that_is_not_python_is_refused(tmp_path):
    with pytest.raises(RewardError, match="not a Python file"):
        load_file(write(tmp_path, "mine.txt", "x") / "mine.txt")


def test_installed_packages_offer_rewards_by_entry_point(monkeypatch):
    class Installed(Reward):
        name = "installed"

        def score_batch(self, images, prompts):
            return torch.zeros(len(prompts))

    class Point:
        name = "installed"

        def load(self):
            return Installed

    asked = []
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: asked.append(group) or [Point()])
    assert isinstance(load_reward("installed"), Installed)
    assert asked == ["pcpo.rewards"]


def test_an_entry_point_bears_its_rewards_name(monkeypatch):
    class Point:
        name = "other"

        def load(self):
            return JpegCompressibility

    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [Point()])
    with pytest.raises(RewardError, match=r"the entry-point name and the class's `name` must match"):
        available()


def test_the_environment_names_the_folder_and_listing_it_runs_no_code(tmp_path, monkeypatch):
    write(tmp_path, "dark.py", GOOD.format(name="darkness"))
    write(tmp_path, "evil.py", "class Evil(object):\n    name = 'evil'\nraise SystemExit")
    write(tmp_path, "broken.py", "def (")
    assert offered() == list(REWARDS)
    monkeypatch.setenv("PCPO_REWARD_FOLDER", str(tmp_path))
    assert offered() == [*REWARDS, "darkness", "evil"]
    with pytest.raises(RewardError, match=r"broken.py failed with SyntaxError"):
        load_reward("darkness")
    for name in ("broken.py", "evil.py"):
        (tmp_path / name).unlink()
    assert load_reward("darkness").score(torch.ones(1, 4, 4, 3), [""]).item() == 0


@pytest.mark.parametrize("annotation", ["", ": str", ": ClassVar[str]"])
def test_a_name_is_listed_with_or_without_its_type(annotation, tmp_path, monkeypatch):
    text = GOOD.format(name="darkness").replace("name =", f"other: str\n    name{annotation} =")
    write(tmp_path, "dark.py", "from typing import ClassVar\n" + text)
    monkeypatch.setenv("PCPO_REWARD_FOLDER", str(tmp_path))
    assert offered() == [*REWARDS, "darkness"]
    assert load_reward("darkness").name == "darkness"


def test_a_folder_that_is_not_there_is_named_and_costs_the_built_in_rewards_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PCPO_REWARD_FOLDER", str(tmp_path / "gone"))
    assert offered() == list(REWARDS)
    assert load_reward("redness").name == "redness"
    with pytest.raises(RewardError, match="gone, which is not a folder"):
        load_reward("darkness")


def test_headless_configurations_name_a_class():
    assert import_reward("comfyui_pcpo.reward.jpeg:JpegCompressibility") is JpegCompressibility
    for spec in ("nowhere_at_all:X", "json:Nothing", ":X", "json"):
        with pytest.raises(RewardError, match="module:Class"):
            import_reward(spec)
    with pytest.raises(RewardError, match="must be a subclass of"):
        import_reward("json:loads")


@pytest.mark.parametrize("name", ["comfyui_pcpo.reward.jpeg:JpegCompressibility", "../mine", "http://127.0.0.1"])
def test_a_name_is_never_code_nor_path_nor_address(name):
    with pytest.raises(RewardError, match="is not a known reward"):
        load_reward(name)


def test_the_table_of_built_in_rewards_has_their_own_names():
    assert {name: cls.name for name, cls in REWARDS.items()} == {name: name for name in CLASSES}


def test_a_new_built_in_reward_is_one_file_and_one_line(tmp_path):
    """In a copy of the package: the class in a file of its own, and its line in CLASSES."""
    package = tmp_path / "comfyui_pcpo"
    shutil.copytree(Path(comfyui_pcpo.__file__).parent, package, ignore=shutil.ignore_patterns("models", "__pycache__"))
    write(package / "reward", "darkness.py", GOOD.format(name="darkness"))
    table = package / "reward" / "__init__.py"
    first = '    "alignment": "alignment:Alignment",'
    table.write_text(table.read_text().replace(first, f'{first}\n    "darkness": "darkness:Darkness",'))
    code = (
        "import torch; from comfyui_pcpo.reward import load_reward, offered; assert 'darkness' in offered(); "
        "print(load_reward('darkness').score(torch.ones(1, 4, 4, 3), ['']).item())"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "0.0", done.stderr
