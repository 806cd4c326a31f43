"""The configuration: what it refuses and what it says, and that it reads back as it was written."""

import typing
from pathlib import Path

import pytest
from pydantic import BaseModel

from trainer.cli.main import main
from trainer.config.diagnostics import unknown_words, without_effect
from trainer.config.loading import build, dump, dump_shareable, load, parse_overrides, tomllib
from trainer.config.options import known_keys, nearest
from trainer.config.schema import Config, ConfigError

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_ready_configuration_reads_back_as_it_was_written(path):
    config = load(path)
    assert build(tomllib.loads(dump(config)), "dump") == config


def test_every_option_says_what_it_does():
    for key in known_keys():
        section, name = key.split(".")
        field = Config.model_fields[section].annotation.model_fields[name]  # type: ignore[union-attr]
        assert field.description, key
        assert field.description.endswith((".", ".)")), key


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("rollout.group_sise", "rollout.group_size"),
        ("optimizer.lr_rate", "optimizer.learning_rate"),
        ("lora.rnak", "lora.rank"),
        ("objective.group_size", "rollout.group_size"),
        ("rollout.sampler", "rollout.method"),
        ("optimizer.lr", "optimizer.learning_rate"),
    ],
)
def test_an_unknown_key_or_flag_names_the_nearest(tmp_path, key, nearest):
    section, name = key.split(".")
    file = tmp_path / "mine.toml"
    file.write_text(f"[{section}]\n{name} = 4\n")
    with pytest.raises(ConfigError, match=rf"mine.toml: unknown key {key}. Did you mean {nearest}\?"):
        load(file)
    with pytest.raises(
        ConfigError, match=rf"unknown option --{key.replace('_', '-')}. Did you mean --{nearest.replace('_', '-')}\?"
    ):
        parse_overrides([f"--{key.replace('_', '-')}", "4"])


def test_a_key_like_no_other_says_where_they_are_listed():
    with pytest.raises(ConfigError, match=r"unknown key zzzzzz. `python -m trainer"):
        build({"zzzzzz": {}}, "test")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"rollout": {"group_size": 8}, "optimizer": {"minibatches": 3}},
            r"rollout.group_size 8 does not split into optimizer.minibatches 3 .* multiple of 3",
        ),
        ({"rollout": {"group_size": 1}}, r"rollout.group_size: .*greater than or equal to 2 \(given: 1\)"),
        ({"rollout": {"steps": 4, "sde_window": 5}}, r"sde_window 5 is longer than rollout.steps 4"),
        ({"rollout": {"sigma": "uniform"}}, r"sigma = uniform needs rollout.target_weight"),
        (
            {"advantage": {"kind": "window", "window": 4, "min_count": 5}},
            r"advantage.min_count 5 is more than advantage.window 4",
        ),
        ({"reward": {"weights": {}}}, r"no reward is set"),
        ({"rollout": {"branch": 1}, "model": {"shard": True}}, r"branch 1 cannot be combined with model.shard"),
        (
            {"objective": {"name": "nft"}, "rollout": {"shared_noise": True}},
            r"shared_noise = true .* objective.name = nft and no rollout.noise_level: .* equal.* or a noise_level",
        ),
        ({"objective": {"name": "awm"}, "rollout": {"shared_noise": True, "noise_level": 0.0}}, r"would be equal"),
        ({"run": {"name": "../outside"}}, r"run.name"),
        ({"run": {"name": "a/b"}}, r"run.name"),
        ({"run": {"name": "a\\b"}}, r"run.name"),
        ({"run": {"name": ".."}}, r"run.name"),
        ({"optimizer": {"learning_rate": "fast"}}, r"optimizer.learning_rate: .*'fast'"),
        ({"optimizer": {"learning_rate": float("nan")}}, r"optimizer.learning_rate"),
        ({"optimizer": {"max_grad_norm": float("nan")}}, r"optimizer.max_grad_norm"),
        ({"reward": {"weights": {"alignment": float("nan")}}}, r"reward.weights"),
        ({"reward": {"weights": {"alignment": float("inf")}}}, r"reward.weights"),
        ({"objective": {"kl_weight": float("inf")}}, r"objective.kl_weight"),
    ],
)
def test_what_cannot_run_is_refused_with_the_number_and_the_rule(tree, message):
    with pytest.raises(ConfigError, match=message):
        build(tree, "test")


@pytest.mark.parametrize(
    ("objective", "noted"),
    [
        ({}, True), ({"credit": "guard"}, True), ({"credit": "guard_dt"}, False), ({"credit": "native"}, False),
        ({"name": "nft"}, False),
    ],
)  # fmt: skip
def test_a_credit_that_is_not_rescaled_and_has_no_constant_of_its_own_is_noted(objective, noted):
    """Noted and not refused: a run that was made so can be opened and resumed."""
    config = build({"objective": {"rescale_credit": False, **objective}}, "test")
    assert any("without its scale" in sentence for sentence in without_effect(config)) == noted


@pytest.mark.parametrize("name", ["nft", "awm"])
def test_shared_noise_of_the_training_and_of_a_sampler_with_noise_are_fine_on_the_forward_process(name):
    build({"objective": {"name": name, "shared_noise": True}}, "test")
    build({"objective": {"name": name}, "rollout": {"shared_noise": True, "noise_level": 0.7}}, "test")


def test_a_file_that_is_missing_or_not_toml_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"gone.toml does not exist"):
        load(tmp_path / "gone.toml")
    (tmp_path / "bad.toml").write_text("[run\n")
    with pytest.raises(ConfigError, match=r"bad.toml is not TOML"):
        load(tmp_path / "bad.toml")


def test_prompts_come_from_lines_and_file_without_blanks_and_comments(tmp_path):
    (tmp_path / "prompts.txt").write_text("# animals\n a fox \n\na frog\n")
    (tmp_path / "c.toml").write_text('[prompts]\nlines = ["a star"]\nfile = "prompts.txt"\n')
    assert load(tmp_path / "c.toml").prompts.read() == ["a star", "a fox", "a frog"]


def test_an_empty_or_missing_prompts_file_is_named(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n# nothing\n")
    with pytest.raises(ConfigError, match=r"empty.txt contains no prompts, but training needs at least one"):
        build({"prompts": {"file": str(empty)}}, "test").prompts.read()
    with pytest.raises(ConfigError, match=r"gone.txt does not exist"):
        build({"prompts": {"file": str(tmp_path / "gone.txt")}}, "test").prompts.read()
    with pytest.raises(ConfigError, match=r"contain no prompts"):
        build({}, "test").prompts.read()


def test_overrides_are_read_as_toml_and_laid_on_the_file(tmp_path):
    (tmp_path / "c.toml").write_text("[rollout]\nsteps = 7\ngroup_size = 4\n")
    tokens = ["--rollout.group-size", "6", "--run.name=cats", "--reward.weights.colorfulness", "2"]
    config = load(tmp_path / "c.toml", parse_overrides([*tokens, "--rollout.shared-noise", "true"]))
    assert (config.rollout.steps, config.rollout.group_size, config.rollout.shared_noise) == (7, 6, True)
    assert config.run.name == "cats"
    assert config.reward.weights["colorfulness"] == 2


@pytest.mark.parametrize("text", ["1", "2024-01-01", "true", "1e3"])
def test_a_text_option_takes_what_looks_like_a_number_as_it_is_written(text):
    config = load(None, parse_overrides(["--run.name", text, "--prompts.lines", text, "--prompts.file", text]))
    assert (config.run.name, config.prompts.lines, config.prompts.file) == (text, (text,), Path(text).resolve())


def test_a_taste_is_found_from_any_folder_and_its_folder_stays_private(tmp_path):
    (tmp_path / "c.toml").write_text('[reward]\nweights = {"mine.safetensors" = 2.0}\nheld_out = "other.safetensors"\n')
    config = load(tmp_path / "c.toml")
    assert config.reward.weights == {str(tmp_path / "mine.safetensors"): 2.0}
    assert config.reward.held_out == (str(tmp_path / "other.safetensors"),)
    shared = tomllib.loads(dump_shareable(config))["reward"]
    assert (shared["weights"], shared["held_out"]) == ({"mine.safetensors": 2.0}, ["other.safetensors"])


@pytest.mark.parametrize(("tokens", "message"), [(["cats"], "is not an option"), (["--run.name"], "has no value")])
def test_an_option_without_dashes_or_value_is_refused(tokens, message):
    with pytest.raises(ConfigError, match=message):
        parse_overrides(tokens)


def test_a_table_given_whole_replaces_and_an_entry_is_added(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[reward]\nweights = {alignment = 1.0}\n")
    whole = load(file, parse_overrides(["--reward.weights", "{redness = 2.0}"]))
    assert whole.reward.weights == {"redness": 2.0}
    more = load(file, parse_overrides(["--reward.weights.redness", "2.0"]))
    assert more.reward.weights == {"alignment": 1.0, "redness": 2.0}


def test_an_entry_is_added_to_a_reward_given_by_its_name_alone(tmp_path):
    both = {"alignment": 1.0, "jpeg": 2.0}
    file = tmp_path / "run.toml"
    file.write_text('[reward]\nweights = "alignment"\n')
    assert load(file, parse_overrides(["--reward.weights.jpeg", "2"])).reward.weights == both
    assert load(file, parse_overrides(["--reward.weights", "jpeg"])).reward.weights == {"jpeg": 1.0}
    options = ["--reward.weights", "alignment", "--reward.weights.jpeg", "2"]
    assert load(None, parse_overrides(options)).reward.weights == both


@pytest.mark.parametrize("value", ["3", '["alignment"]', '""', "true"])
def test_weights_that_are_neither_a_name_nor_a_table_are_refused_before_an_entry_is_added(tmp_path, value):
    file = tmp_path / "run.toml"
    file.write_text(f"[reward]\nweights = {value}\n")
    with pytest.raises(ConfigError, match=r"run.toml: reward.weights is .*, but must be a reward's name or a table"):
        load(file, parse_overrides(["--reward.weights.jpeg", "2"]))
    with pytest.raises(ConfigError, match=r"options: reward.weights is "):
        parse_overrides(["--reward.weights", value, "--reward.weights.jpeg", "2"])


def test_a_reward_with_a_dot_in_its_name_is_one_option():
    overrides = parse_overrides(["--reward.weights.hpsv2.1", "0.5", "--reward.weights.my-pack.mod:Judge=2"])
    assert overrides["reward"]["weights"] == {"hpsv2.1": 0.5, "my-pack.mod:Judge": 2}


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        ({"objective": {"name": "awm", "credit": "native"}}, "objective.credit"),
        ({"objective": {"name": "nft", "form": "linear"}}, "objective.form"),
        ({"objective": {"name": "nft", "clip_range": 5e-3}}, "objective.clip_range"),
        ({"objective": {"nft_beta": 0.5}}, "objective.nft_beta"),
        ({"advantage": {"kind": "window", "spread": "batch"}}, "advantage.spread"),
        ({"advantage": {"window": 64}}, "advantage.window"),
        ({"rollout": {"detach_unconditional": True}}, "rollout.detach_unconditional"),
        ({"model": {"config": "somewhere"}}, "model.config"),
        ({"optimizer": {"ema_every": 4}}, "optimizer.ema_every"),
        ({"prompts": {"negative": "blurry"}}, "prompts.negative"),
        ({"rollout": {"batch_cfg": False}}, "rollout.batch_cfg"),
        ({"advantage": {"min_count": 4}}, "advantage.min_count"),
        ({"objective": {"kl_weight": 0.1, "kl_images": 2}}, "objective.kl_images"),
        ({"objective": {"name": "awm"}, "rollout": {"sde_window": 2}}, "rollout.sde_window"),
        ({"objective": {"kl_mask": 1e-5, "clip_range": 0.2}}, "objective.clip_range"),
        ({"guard": {"every": 5, "kl_budget": 1e-4}, "objective": {"kl_images": 7}}, "objective.kl_images"),
        ({"guard": {"every": 5, "kl_budget": 1e-4}, "objective": {"kl_every": 3}}, "objective.kl_every"),
        ({"reward": {"constraint_rate": 3}}, "reward.constraint_rate"),
        ({"rollout": {"cfg": 2, "detach_unconditional": True, "batch_cfg": False}}, "rollout.batch_cfg"),
        ({"objective": {"name": "nft"}, "rollout": {"method": "cps", "noise_level": 0.0}}, "rollout.method"),
    ],
)
def test_a_setting_that_does_nothing_beside_the_others_is_named(tree, key):
    (sentence,) = without_effect(build(tree, "test"))
    assert sentence.startswith(f"{key} has no effect, because ")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_our_own_configurations_hold_nothing_without_effect(path):
    assert without_effect(load(path)) == []


def test_levels_decide_the_steps_although_the_sampler_has_noise():
    tree = {"objective": {"name": "awm", "levels": 2}, "rollout": {"noise_level": 0.7, "sde_window": 2}}
    assert without_effect(build(tree, "test")) == [
        "rollout.sde_window has no effect, because objective.levels decides the steps."
    ]


def test_a_command_says_what_has_no_effect(capsys):
    assert main(["check", "--objective.nft-beta", "0.5", "--prompts.lines", "['a fox']"]) == 0
    assert "note: objective.nft_beta has no effect, because objective.name is log_hinge." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tokens", "read"),
    [
        (["--reward.weights", "polish"], {"polish": 1.0}),
        (["--reward.weights", '{"polish": 2}'], {"polish": 2.0}),
        (["--reward.weights", "{polish = 2}"], {"polish": 2.0}),
        (["--reward.weights.polish", "2"], {"polish": 2.0}),
    ],
)
def test_rewards_may_be_given_as_a_name_as_json_or_as_toml(tokens, read):
    assert load(None, parse_overrides(tokens)).reward.weights == read


def test_a_text_alone_is_a_list_of_one():
    config = load(None, parse_overrides(["--prompts.lines", "a fox", "--reward.held-out", "polish"]))
    assert config.prompts.lines == ("a fox",) and config.reward.held_out == ("polish",)


def test_a_mistake_in_an_option_is_not_blamed_on_the_file_alone():
    with pytest.raises(ConfigError, match=r"tiny-flow\.toml and options: run\.updates: .*'many'"):
        load(CONFIGS[0].with_name("tiny-flow.toml"), parse_overrides(["--run.updates", "many"]))


def test_words_that_an_embedded_model_never_learned_are_named(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a fox\na zebra\n")
    (sentence,) = unknown_words(build({"prompts": {"file": str(file)}}, "test"))
    assert sentence.startswith("emoji-flow was not trained on: zebra.")
    assert unknown_words(build({"prompts": {"file": str(tmp_path / "none.txt")}}, "test")) == []
    assert unknown_words(build({}, "test")) == []
    file.write_text("# nothing yet\n")
    assert unknown_words(build({"prompts": {"file": str(file)}}, "test")) == []  # what is missing is told elsewhere
    (sentence,) = unknown_words(build({"prompts": {"lines": ["a cat on a blue background", "two foxes"]}}, "test"))
    assert sentence.startswith("emoji-flow was not trained on: cat. Known objects: fox, panda")
    assert unknown_words(build({"model": {"name": "sd"}, "prompts": {"lines": ["a cat"]}}, "test")) == []
    assert unknown_words(load(CONFIGS[0].with_name("tiny-flow.toml"))) == []


def numbers(section=Config, prefix=""):
    """Name and field of every numeric option."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from numbers(kind, f"{prefix}{name}.")
        elif typing.get_origin(kind) is not dict and {int, float} & {kind, *typing.get_args(kind)}:
            yield prefix + name, field


@pytest.mark.parametrize(("key", "field"), [pytest.param(*pair, id=pair[0]) for pair in numbers()])
def test_every_number_has_a_range_and_is_refused_beyond_it(key, field):
    bounds = {name: value for item in field.metadata for name, value in vars_of(item).items()}
    low = next((bounds[name] for name in ("ge", "gt") if name in bounds), None)
    high = next((bounds[name] for name in ("le", "lt") if name in bounds), None)
    assert low is not None and high is not None, f"{key} has no range"
    section, name = key.split(".")
    for value in (low - 1, high * 2 + 1, "nan", "inf", "-inf", 1e400, "many"):
        with pytest.raises(ConfigError, match=key):
            build({section: {name: value}}, "test")


def vars_of(item):
    return {name: getattr(item, name) for name in ("ge", "gt", "le", "lt") if getattr(item, name, None) is not None}


def test_a_typo_is_told_before_what_other_programs_call_a_setting():
    assert nearest("optimizer.beta") in ("Did you mean optimizer.beta1?", "Did you mean optimizer.beta2?")
    assert nearest("objective.beta") == nearest("beta") == "Did you mean objective.kl_weight?"


def test_true_is_no_number_in_a_table_either():
    with pytest.raises(ConfigError, match=r"reward.weights: must be a number, not true or false"):
        build({"reward": {"weights": {"colorfulness": True}}}, "test")
