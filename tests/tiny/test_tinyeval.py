"""TinyEval asks for what training never shows, and counts an image as right only if everything is."""

import pytest
import torch

from comfyui_pcpo.reward import RewardError, load_reward
from comfyui_pcpo.tiny.align import Detection, Reading
from comfyui_pcpo.tiny.captions import is_held_out
from comfyui_pcpo.tiny.tinyeval import (
    HARD,
    TASKS,
    is_right,
    known_scene,
    partial_score,
    shares,
    suite,
    suite_prompts,
    task_of,
)
from tools.tiny.measure import drawn
from tools.tiny.templates import read_by_templates


def reading(*kinds: str, color: str = "red", pattern: str = "plain") -> Reading:
    """One thing beside the other, from left to right."""
    return Reading(tuple(Detection(kind, 24 + 40 * n, 64, 40, 1) for n, kind in enumerate(kinds)), color, pattern)


def test_every_task_has_twenty_prompts_of_its_own_that_training_never_shows():
    assert tuple(suite()) == TASKS and len(set(suite_prompts())) == 120
    for task, prompts in suite().items():
        for prompt in prompts:
            assert task_of(known_scene(prompt)) == task and is_held_out(known_scene(prompt))


@pytest.mark.parametrize(
    ("prompt", "found", "value"),
    [
        ("a fox left of a panda", reading("fox", "panda"), 1),
        ("a fox left of a panda", reading("panda", "fox"), 2 / 3),
        ("a fox and a panda", reading("fox"), 1 / 2),
        ("a fox and a panda", reading("pig"), 0),
        ("three foxes", reading("fox", "fox"), (1 + 2 / 3) / 2),
        ("a fox", reading("fox", "fox", "fox"), 1 / 2),
        ("a fox on a striped red background", reading("fox"), 3 / 4),
        ("a red square and a blue circle", reading("blue square", "red circle"), 0),
        ("a fox", reading(), 0),
    ],
)
def test_a_grade_is_the_mean_over_what_the_prompt_states(prompt, found, value):
    scene = known_scene(prompt)
    assert partial_score(found, scene) == pytest.approx(value)
    assert is_right(found, scene) == (value == 1)


def test_shares_are_means_over_tasks_and_missing_tasks_have_none():
    right = {"position": [True, False], "counting": [True, True]}
    prompts = [prompt for task, values in right.items() for prompt in suite()[task][: len(values)]]
    assert shares([value for values in right.values() for value in values], prompts) == {
        "counting": 1,
        "position": 0.5,
    }
    everything = [prompt for task in TASKS for prompt in suite()[task]]
    found = shares([task_of(known_scene(prompt)) in HARD for prompt in everything], everything)
    assert found["hard tasks"] == 1 and found["all tasks"] == pytest.approx(len(HARD) / len(TASKS))


def test_drawings_of_the_suite_are_read_as_what_they_show():
    prompts = list(suite_prompts())
    scores = load_reward("tinyeval").score(drawn(prompts, seed=0), prompts)
    assert (scores == 1).double().mean() >= 0.98


def test_the_reward_names_a_prompt_from_another_world_and_the_form_it_needs():
    with pytest.raises(RewardError, match="'a photo of a cat' is not a prompt of the embedded models' domain"):
        load_reward("tinyeval").score(torch.zeros(1, 128, 128, 3), ["a photo of a cat"])


def test_template_matching_reads_drawings_as_what_they_show():
    prompts = list(suite_prompts())[::2]
    images = drawn(prompts, seed=3).permute(0, 3, 1, 2)
    pairs = zip(images, prompts, strict=True)
    assert sum(is_right(read_by_templates(image), known_scene(prompt)) for image, prompt in pairs) >= 58
