"""Lists of prompts: text, jsonl and CSV, and the metadata that rewards are handed."""

import copy
import pickle

import pytest
import torch

from comfyui_pcpo.prompt import parse_line, prompt_line
from comfyui_pcpo.reward import Prompt, Reward, RewardSettings, metadata_of
from trainer.config.loading import dump, load
from trainer.config.schema import ConfigError, PromptsConfig

GENEVAL = '{"prompt": "two foxes", "tag": "counting", "include": [{"class": "fox", "count": 2}]}'
WANTED = {"tag": "counting", "include": [{"class": "fox", "count": 2}]}


class Counting(Reward):
    """The count that the metadata asks for; the images do not matter."""

    name = "counting"

    def score_batch(self, images, prompts):
        return torch.tensor([float(metadata_of(p).get("include", [{"count": -1}])[0]["count"]) for p in prompts])


def read(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    return PromptsConfig(file=tmp_path / name).read()


def test_jsonl_lines_are_prompts_with_metadata(tmp_path):
    prompts = read(tmp_path, "p.jsonl", f'{GENEVAL}\n\n"a star"\n{{"prompt": " a fox "}}\n')
    assert prompts == ["two foxes", "a star", "a fox"]
    assert [metadata_of(prompt) for prompt in prompts] == [WANTED, {}, {}]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a fox", r"p.jsonl: line 2 is not JSON"),
        ('{"tag": "x"}', r'p.jsonl: line 2 has no text under "prompt"'),
        ('{"prompt": ""}', r'line 2 has no text under "prompt"'),
        ("[1]", r'line 2 has no text under "prompt"'),
    ],
)
def test_a_broken_jsonl_line_is_named(tmp_path, line, said):
    with pytest.raises(ConfigError, match=said):
        read(tmp_path, "p.jsonl", f'"a star"\n{line}\n')


def test_a_csv_with_a_column_of_prompts_has_metadata_in_the_others(tmp_path):
    prompts = read(tmp_path, "p.csv", 'tag,prompt,style\ncolor,"a red fox, at night",\n,,\nshape,a star,ink\n')
    assert prompts == ["a red fox, at night", "a star"]
    assert [metadata_of(prompt) for prompt in prompts] == [{"tag": "color"}, {"tag": "shape", "style": "ink"}]


@pytest.mark.parametrize("header", ["Prompt,tag", "PROMPT,tag", '" prompt ",tag', "prompt ,tag"])
def test_a_csv_header_may_be_in_any_case(tmp_path, header):
    (prompt,) = read(tmp_path, "p.csv", f"{header}\na fox,color\n")
    assert (prompt, metadata_of(prompt)) == ("a fox", {"tag": "color"})


def test_a_csv_header_may_come_after_empty_lines(tmp_path):
    (prompt,) = read(tmp_path, "p.csv", "\n\nprompt,tag\na fox,color\n")
    assert (prompt, metadata_of(prompt)) == ("a fox", {"tag": "color"})


def test_a_line_too_long_for_a_csv_cell_is_a_prompt(tmp_path):
    long = "a fox " * 30_000
    assert read(tmp_path, "p.csv", f"{long}\na frog\n") == [long.strip(), "a frog"]


@pytest.mark.parametrize(
    ("lines", "prompts"),
    [
        ("a fox\n\na frog\r\n", ["a fox", "a frog"]),
        (["a fox\na frog", "a star"], ["a fox", "a frog", "a star"]),
        ('{"prompt": "a star",\n "tag": "shape"}', ["a star"]),
        ('{"prompt": "a star"}\n{"prompt": "a fox"}', ["a star", "a fox"]),
        ("{red|blue} fox\na frog", ["{red|blue} fox", "a frog"]),
        (["a\x0cfox", "a\u2028frog"], ["a\x0cfox", "a\u2028frog"]),
    ],
)
def test_a_text_of_several_lines_is_a_prompt_per_line_and_a_json_object_one(lines, prompts):
    assert PromptsConfig(lines=lines).read() == prompts


@pytest.mark.parametrize("header", ["prompt;tag", "tag\tPrompt", "Prompts", '"prompt";"tag"', "prompts,tag"])
def test_a_csv_header_in_another_form_is_not_trained_as_a_prompt(tmp_path, header):
    with pytest.raises(ConfigError, match=r"p\.csv: the first line .* looks like a header.* called prompt\. Save it"):
        read(tmp_path, "p.csv", f"{header}\na fox;color\n")
    assert read(tmp_path, "p.txt", f"{header}\na fox\n")[1] == "a fox"


def test_a_line_break_in_a_csv_cell_is_a_space_of_the_prompt_and_stays_in_metadata(tmp_path):
    (prompt,) = read(tmp_path, "p.csv", 'prompt,note\n"a red fox\r\nin  snow","two\r\nlines"\n')
    assert (prompt, metadata_of(prompt)) == ("a red fox in snow", {"note": "two\nlines"})


def test_text_and_csv_without_such_a_column_are_a_prompt_per_line_as_before(tmp_path):
    text = "a fox, at night\n# no\n\n{red|blue} star\n"
    for name in ("p.txt", "p.csv", "p"):
        assert read(tmp_path, name, text) == ["a fox, at night", "{red|blue} star"]


def test_a_line_of_the_configuration_may_be_an_object(tmp_path, make_config):
    config = make_config(prompts={"lines": ["a fox", GENEVAL]})
    (tmp_path / "c.toml").write_text(dump(config), encoding="utf-8")
    fox, two = load(tmp_path / "c.toml").prompts.read()
    assert (fox, metadata_of(fox), two, metadata_of(two)) == ("a fox", {}, "two foxes", WANTED)


def test_metadata_survives_copies_and_a_line_of_text():
    prompt = Prompt("two foxes", WANTED)
    for same in (copy.deepcopy(prompt), pickle.loads(pickle.dumps(prompt)), parse_line(prompt_line(prompt))):
        assert (same, metadata_of(same)) == (prompt, WANTED)
    assert prompt_line("a fox") == "a fox" and prompt_line("{red|blue} fox") == "{red|blue} fox"


@pytest.mark.parametrize("text", ["# 1 dog", '{"a": 1}', '{"prompt": "a fox"}', "a fox\nin snow", "a fox\x85in snow"])
def test_a_text_that_would_be_read_as_something_else_is_an_object_in_a_list(text):
    line = prompt_line(text)
    assert line.startswith('{"prompt"') and parse_line(line) == text


def test_rewards_are_handed_metadata_also_if_the_host_rewrites_prompts():
    images, prompts = torch.zeros(2, 4, 4, 3), [Prompt("(two) foxes", WANTED), "a fox"]
    reward = Counting(RewardSettings(plain=lambda text: text.replace("(", "").replace(")", "")))
    assert reward.score(images, prompts).tolist() == [2, -1]


def test_training_hands_metadata_to_rewards_and_keeps_checkpoints_plain(make_config, learn, tmp_path):
    config = make_config(prompts={"lines": [GENEVAL]}, advantage={"kind": "window"}, run={"updates": 1})
    state, updates = learn(config, rewards={"colorfulness": Counting()})
    (update,) = updates
    assert update.metrics["reward_mean"] == 2
    assert [type(prompt) for prompt in state.window.state_dict()["windows"]] == [str]


def test_two_columns_of_prompts_are_refused(tmp_path):
    (tmp_path / "p.csv").write_text("Prompt,prompt\nshort,a long prompt\n")
    with pytest.raises(ConfigError, match=r"p\.csv has 2 columns of prompts: Prompt, prompt\. Rename all but one"):
        PromptsConfig(file=tmp_path / "p.csv").read()
