"""Resume compares a run with its own record: what would change is refused by name, or accepted and recorded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from running import kept, start_run
from safetensors.torch import load_file

from comfyui_pcpo.reward.base import RewardSettings
from comfyui_pcpo.reward.color import Colorfulness
from comfyui_pcpo.taste.encoders import tiny_encoder
from comfyui_pcpo.taste.learned import Taste, TasteReport
from trainer.config.loading import build, with_options
from trainer.config.options import known_keys
from trainer.config.schema import Config, ConfigError
from trainer.fingerprints import fingerprint
from trainer.loop.align import align
from trainer.policy.lora_pairs import load_pairs
from trainer.runs.folder import RunFolder
from trainer.runs.identity import differences, identity_of
from trainer.runs.launch import ResumeOptions, resume_run
from trainer.runs.rows import append_record, read_rows, row_problems

_finished: dict[str, Path] = {}


@pytest.fixture
def folder(make_config, tmp_path) -> RunFolder:
    """A copy of one run of two updates, whose prompts are in a file."""
    if "run" not in _finished or not _finished["run"].exists():
        (tmp_path / "prompts.txt").write_text("a fox\na red star\n")
        run, updates = start_run(make_config(prompts={"lines": [], "file": str(tmp_path / "prompts.txt")}))
        list(updates)
        _finished["run"] = run.path
    return RunFolder(Path(shutil.copytree(_finished["run"], tmp_path / "copy")))


def edit(folder: RunFolder, before: str, after: str) -> None:
    text = folder.config_file.read_text()
    assert before in text
    folder.config_file.write_text(text.replace(before, after))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ("group_size = 2", "group_size = 4", "rollout.group_size was 2 and is 4"),
        ("seed = 0", "seed = 1", "run.seed was 0 and is 1"),
        ('name = "emoji-flow"', 'name = "emoji-eps"', "model.name was 'emoji-flow' and is 'emoji-eps'"),
        ("colorfulness = 1.0", "alignment = 1.0", "reward.weights was {'colorfulness': 1.0} and is {'alignment': 1.0}"),
        ('name = "log_hinge"', 'name = "ppo"', "objective.name was 'log_hinge' and is 'ppo'"),
        ("rank = 2", "rank = 3", "lora.rank was 2 and is 3"),
        ("learning_rate = 0.001", "learning_rate = 0.1", "optimizer.learning_rate was 0.001 and is 0.1"),
    ],
)
def test_a_setting_that_makes_another_run_is_refused_by_name(folder, before, after, named):
    edit(folder, before, after)
    with pytest.raises(ConfigError) as error:
        resume_run(folder.path, ResumeOptions(updates=3))
    assert named in str(error.value) and "--accept-changes" in str(error.value)
    assert folder.checkpoints.numbers() == [1, 2]


@pytest.mark.slow
def test_prompts_that_were_edited_are_named(folder, tmp_path):
    file = folder.config().prompts.file
    assert file is not None
    before = file.read_text()
    file.write_text("a fox\na green star\n")
    try:
        with pytest.raises(ConfigError, match=r"2 prompts were added, removed or edited, such as 'a red star'"):
            resume_run(folder.path, ResumeOptions(updates=3))
    finally:
        file.write_text(before)


@pytest.mark.slow
def test_accepted_changes_are_recorded_and_are_no_changes_afterwards(folder):
    edit(folder, "learning_rate = 0.001", "learning_rate = 0.002")
    with resume_run(folder.path, ResumeOptions(updates=3, accept_changes=True)) as run:
        for update in align(run.state, run.job):
            run.keep(update)
    record = json.loads(folder.record_file.read_text())
    change = "optimizer.learning_rate was 0.001 and is 0.002"
    assert record["changes"] == [{"after_update": 2, "changed": [change]}]
    assert change in folder.log_file.read_text()
    assert folder.records()[-1]["learning_rate"] == 0.002
    resume_run(folder.path, ResumeOptions(updates=4))


@pytest.mark.slow
def test_another_rank_is_refused_even_if_it_is_accepted(folder):
    edit(folder, "rank = 2", "rank = 3")
    with (
        pytest.raises(ConfigError, match=r"is of another LoRA: .* Set model, lora.rank and lora.targets back"),
        resume_run(folder.path, ResumeOptions(updates=3, accept_changes=True)),
    ):
        pytest.fail("the run does not begin")
    assert folder.checkpoints.numbers() == [1, 2]


@pytest.mark.slow
def test_where_and_how_a_run_is_computed_may_change(folder):
    edit(folder, "images_at_once = 16", "images_at_once = 1")
    edit(folder, "save_every = 1", "save_every = 5")
    edit(folder, "kl_every = 10", "kl_every = 5")
    resume_run(folder.path, ResumeOptions(updates=3))


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_config_that_was_cut_off_is_refused(folder, share):
    lines = folder.config_file.read_text().splitlines(keepends=True)
    sections = [n for n, line in enumerate(lines) if line.startswith("[")]
    cut = sections[int(share * len(sections))]
    folder.config_file.write_text("".join(lines[:cut]))
    with pytest.raises(ConfigError, match=r"config.toml is cut off: its last line, `# end`, is missing"):
        resume_run(folder.path, ResumeOptions(updates=3))


@pytest.mark.slow
def test_a_run_whose_record_is_lost_goes_on_only_where_that_is_accepted(folder):
    folder.record_file.unlink()
    edit(folder, "learning_rate = 0.001", "learning_rate = 0.3")
    with pytest.raises(ConfigError, match=r"run.json, which records how it was made, is missing"):
        resume_run(folder.path, ResumeOptions(updates=3))
    with resume_run(folder.path, ResumeOptions(updates=3, accept_changes=True)):
        pass
    assert json.loads(folder.record_file.read_text())["changes"][0]["after_update"] == 2


@pytest.mark.slow
def test_checkpoints_keep_the_strength_that_they_were_trained_with(folder):
    before = folder.lora("1")
    edit(folder, "rank = 2", "rank = 2\nalpha = 20.0")
    with resume_run(folder.path, ResumeOptions(updates=3, accept_changes=True)) as run:
        for update in align(run.state, run.job):
            run.keep(update)
    after = folder.lora("1")
    assert all(torch.equal(one, other) for name in before for one, other in zip(before[name], after[name], strict=True))
    stored = load_pairs(folder.checkpoint() / "lora.safetensors")
    name = next(iter(before))
    assert torch.equal(folder.lora()[name][1], 10 * stored[name][1])


def test_a_model_that_was_moved_is_the_same_and_a_missing_one_is_told_by_loading():
    recorded = {"model.name": "/old/m.safetensors", "content of model.name": "abc"}
    assert differences(recorded, {"model.name": "/new/m.safetensors", "content of model.name": "abc"}) == []
    assert differences(recorded, {"model.name": "/old/m.safetensors", "content of model.name": None}) == []
    for other in ("emoji-eps", "someone/another-model"):
        (named,) = differences(recorded, {"model.name": other, "content of model.name": None})[:1]
        assert named == f"model.name was '/old/m.safetensors' and is {other!r}"
    assert differences(recorded, {"model.name": "/old/m.safetensors", "content of model.name": "xyz"}) == [
        "the model has other weights"
    ]


@pytest.mark.slow
def test_a_run_of_version_0_1_resumes_without_record_and_manifest(folder):
    text = folder.config_file.read_text().splitlines()
    folder.config_file.write_text("\n".join(line for line in text if not line.startswith(("#", "keep = "))))
    folder.record_file.unlink()
    for number in folder.checkpoints.numbers():
        (folder.checkpoints.path / f"{number:06d}" / "manifest.json").unlink()
    with resume_run(folder.path, ResumeOptions(updates=3)) as run:
        assert run.state.done == 2
    assert folder.record_file.is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda lines: lines[1:], "metrics.jsonl lacks the row of update 1"),
        (lambda lines: [lines[0], *lines], "metrics.jsonl repeats the row of update 1"),
        (lambda lines: [lines[0][:40] + "\n", lines[1]], "metrics.jsonl lacks the row of update 1"),
    ],
)
def test_rows_of_the_metrics_that_are_not_there_once_are_named(folder, spoil, named):
    lines = folder.metrics_file.read_text().splitlines(keepends=True)
    folder.metrics_file.write_text("".join(spoil(lines)))
    with pytest.raises(ConfigError, match=named):
        resume_run(folder.path, ResumeOptions(updates=3))


def learn_taste(file: Path, seed: int) -> str:
    """Write a taste of random weights, -> its name as a reward."""
    probe = tiny_encoder(RewardSettings()).probe()
    weight = torch.randn(len(probe), generator=torch.Generator().manual_seed(seed))
    Taste("emoji-align", weight, 0.0, probe, TasteReport(5, 5, 0.5, 0.1, 0.5, 1.0)).save(file)
    return str(file)


@pytest.mark.slow
@pytest.mark.parametrize("trained", [True, False])
def test_a_taste_that_was_learned_again_is_a_change_and_the_guard_measures_the_base_again(
    make_config, tmp_path, trained
):
    taste = learn_taste(tmp_path / "taste.safetensors", 1)
    reward = {"weights": {taste: 1.0}} if trained else {"held_out": [taste]}
    guard = {"every": 1, "prompts": 2, "images": 2, "action": "warn"}
    folder, updates = start_run(make_config(reward=reward, guard=guard, run={"updates": 1}))
    list(updates)
    before = load_file(folder.guard_file)[f"scores.{taste}"]
    with resume_run(folder.path, ResumeOptions(updates=2)) as run:
        assert torch.equal(run.guard.base.scores[taste], before)
    learn_taste(Path(taste), 2)
    with pytest.raises(ConfigError, match=r"the reward \S*taste.safetensors has other weights\..*--accept-changes"):
        resume_run(folder.path, ResumeOptions(updates=2))
    with resume_run(folder.path, ResumeOptions(updates=2, accept_changes=True)) as run:
        assert not torch.equal(run.guard.base.scores[taste], before)


@pytest.mark.slow
def test_a_window_of_other_rewards_is_left_out_when_the_change_is_accepted(make_config, tmp_path):
    """One reward to two, whose windows have other shapes; another weight, of a raw sum; a taste learned again."""
    taste, window = learn_taste(tmp_path / "taste.safetensors", 1), {"kind": "window", "window": 4, "min_count": 2}
    config = make_config(advantage=window, prompts={"lines": ["a fox"]}, run={"updates": 1})

    def trained_on(weights: dict[str, float], config: Config) -> Config:
        tree = config.model_dump()
        tree["reward"]["weights"] = weights
        return build(tree, "test")

    folder, updates = start_run(trained_on({taste: 1.0}, config))
    list(updates)

    def sizes(weights: dict[str, float], updates: int) -> list[int]:
        """Lengths of the window after one more update."""
        folder.rewrite_config(trained_on(weights, folder.config()))
        run = resume_run(folder.path, ResumeOptions(updates=updates, accept_changes=True))
        list(kept(run))
        return [len(rewards) for rewards in run.state.window.windows.values()]

    assert sizes({taste: 1.0}, 2) == [4]
    assert sizes({taste: 2.0}, 3) == [2]
    assert sizes({taste: 2.0, "colorfulness": 1.0}, 4) == [2]
    learn_taste(Path(taste), 2)
    assert sizes({taste: 2.0, "colorfulness": 1.0}, 5) == [2]
    assert sizes({"colorfulness": 1.0, taste: 2.0}, 6) == [2]


def test_what_may_change_on_resume_and_nothing_else(make_config):
    """A list by hand: every other setting is compared."""
    free = {
        *("model.device", "model.offload", "model.gradient_checkpointing", "model.compile", "model.shard"),
        *("prompts.lines", "prompts.file", "rollout.images_at_once", "rollout.batch_cfg"),
        *("objective.kl_images", "objective.kl_every", "lora.start"),
        *("reward.folder", "reward.device", "reward.images_at_once", "reward.offload", "reward.overlap"),
        *("reward.max_failed", "reward.patience"),
        *("guard.every", "guard.prompts", "guard.images", "guard.tolerance", "guard.diversity_tolerance"),
        *("guard.patience", "guard.action"),
        *("run.name", "run.folder", "run.updates", "run.preview_every", "run.save_every", "run.keep"),
        "run.tensorboard",
    }
    compared = identity_of(make_config(), ["a fox"]).keys()
    assert {key for key in known_keys() if key not in compared} == free
    for key in compared & set(known_keys()):
        assert differences({key: "before"}, {key: "after"}) == [f"{key} was 'before' and is 'after'"]


def test_a_damaged_record_is_named(tmp_path, make_config):
    from trainer.runs.identity import RunRecord

    file = tmp_path / "run.json"
    file.write_text("{")
    assert "run.json is damaged" in RunRecord(file).changes(identity_of(make_config(), ["a fox"]))[0]


def test_equal_settings_have_no_differences_and_unknown_ones_are_left_out(make_config):
    one = identity_of(make_config(), ["a fox"])
    assert differences(json.loads(json.dumps(one)), one) == []
    assert differences({"rollout.steps": 3}, one) == []
    other = identity_of(with_options(make_config(), {"run": {"updates": 9, "name": "other"}}), ["a fox"])
    assert differences(one, other) == []


def test_what_a_reward_has_learned_may_differ_by_rounding_only(make_config):
    def made(*weights: float) -> dict:
        rewards = {"mine": Colorfulness()}
        rewards["mine"].learned = list(weights)
        return json.loads(json.dumps(identity_of(make_config(), ["a fox"], rewards)))

    one = made(0.6, -0.5, 0.2)
    assert differences(one, made(0.6005, -0.4995, 0.2)) == []
    for other in (made(0.6, -0.4, 0.2), made(-0.6, 0.5, -0.2), made(0.6, -0.5)):
        assert differences(one, other) == ["the reward mine has other weights"]


def test_another_noise_schedule_is_a_difference_and_rounding_or_another_number_of_steps_is_none(make_config):
    def made(*levels: float) -> dict:
        return json.loads(json.dumps(identity_of(make_config(), ["a fox"], levels=levels or None)))

    one = made(1.0, 0.858, 0.602, 0.0)
    assert differences(one, made(1.0, 0.667, 0.334, 0.0)) == [
        "the model has another noise schedule (such as another shift)"
    ]
    for same in (made(1.0, 0.858 + 1e-6, 0.602, 0.0), made(1.0, 0.5, 0.0), made()):
        assert differences(one, same) == differences(made(), same) == []


def test_a_models_fingerprint_changes_with_any_byte_that_is_sampled(tmp_path):
    file = tmp_path / "model.safetensors"
    content = bytearray(3 << 20)
    file.write_bytes(content)
    before = fingerprint(file)
    content[-1] = 1
    file.write_bytes(content)
    assert fingerprint(file) != before == fingerprint_of(tmp_path, bytes(3 << 20))
    assert fingerprint(Path("emoji-flow")) is None


def fingerprint_of(folder: Path, content: bytes) -> str | None:
    (folder / "model.safetensors").write_bytes(content)
    return fingerprint(folder)


def test_a_row_that_does_not_fit_on_the_disk_leaves_the_file_as_it_was(tmp_path):
    resource = pytest.importorskip("resource")
    file = tmp_path / "metrics.jsonl"
    append_record(file, {"update": 1})
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 5, old[1]))
    try:
        with pytest.raises(OSError):
            append_record(file, {"update": 2, "loss": 0.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert file.read_text() == '{"update": 1}\n'


def test_lines_that_are_no_rows_are_counted(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"update": 1}\n[1]\n\xff\xfe\n{"update": "2"}\n\n{"update": 3}\n{"upd')
    rows, damaged = read_rows(file)
    assert [row["update"] for row in rows] == [1, 3]
    assert damaged == [2, 3, 4, 7]
    assert row_problems(file, 3) == ["metrics.jsonl lacks the row of update 2"]


@pytest.mark.parametrize("name", ["darkness", "own_rewards:Darkness"])
def test_an_edited_reward_of_ones_own_is_a_change_and_its_file_is_not_run(make_config, tmp_path, monkeypatch, name):
    file = tmp_path / "own_rewards.py"
    file.write_text('raise RuntimeError\nclass Darkness(Reward):\n    name = "darkness"\n')
    monkeypatch.setenv("PCPO_REWARD_FOLDER", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    config = make_config(reward={"weights": {name: 1.0}})
    before = identity_of(config, ["a fox"])
    assert differences(before, identity_of(config, ["a fox"])) == []
    file.write_text(file.read_text() + "# edited\n")
    assert differences(before, identity_of(config, ["a fox"])) == [f"the reward {name} has other code"]
