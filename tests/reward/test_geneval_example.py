"""The documented reward server of docs/rewards: its conditions, with a detector that finds what it is told to."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from comfyui_pcpo.reward import Prompt

FILE = Path(__file__).resolve().parents[2] / "docs" / "rewards" / "remote_geneval.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("remote_geneval", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["remote_geneval"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["remote_geneval"]


def score(example, metadata, *found):
    asked = []

    def detect(image, names):
        asked.extend(names)
        return [example.Found(name, (x, y, x + 2, y + 2)) for name, x, y in found]

    reward = example.GenEval(detector=detect)
    value = reward.score(torch.zeros(1, 8, 8, 3), [Prompt("p", metadata)]).item()
    return value, asked, reward.failure


def test_counts_colours_and_absences_are_conditions(example):
    metadata = {"include": [{"class": "fox", "count": 2, "color": "red"}], "exclude": [{"class": "dog"}]}
    assert score(example, metadata, ("red fox", 0, 0), ("red fox", 4, 0))[:2] == (1.0, ["red fox", "dog"])
    assert score(example, metadata, ("red fox", 0, 0), ("dog", 0, 0))[0] == 0
    assert score(example, metadata, ("red fox", 0, 0))[0] == 0.5
    assert score(example, metadata, *[("red fox", n, 0) for n in range(3)])[0] == 0.5


@pytest.mark.parametrize(
    ("relation", "holds"), [("left of", True), ("right of", False), ("above", True), ("below", False)]
)
def test_positions_compare_centres(example, relation, holds):
    metadata = {"include": [{"class": "bench"}, {"class": "dog", "position": [relation, 0]}]}
    value = score(example, metadata, ("bench", 4, 4), ("dog", 0, 0))[0]
    assert value == pytest.approx(1 if holds else 2 / 3)


def test_a_prompt_without_conditions_fails_with_the_reason(example):
    value, _, failure = score(example, {"tag": "x"})
    assert value != value and "no include or exclude" in failure
