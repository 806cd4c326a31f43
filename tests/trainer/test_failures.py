"""Errors of PyTorch during a run: the error itself is told, and how to go on, whether or not an update was finished."""

import pytest
import torch
from running import start_run

from comfyui_pcpo.reward import Reward, RewardError
from trainer.config.loading import build
from trainer.config.schema import Config, ConfigError
from trainer.loop.align import align
from trainer.loop.scoring import RunError, check_failures
from trainer.runs import launch
from trainer.runs.failures import explained, memory_advice
from trainer.runs.folder import RunFolder


def test_an_error_of_the_first_update_is_told_although_its_folder_is_gone(tmp_path):
    folder = RunFolder(tmp_path / "run")
    message = r"^mat1 and mat2 \(a RuntimeError .* No update was finished, so the same command starts anew\.$"
    with pytest.raises(ConfigError, match=message), explained(Config(), folder):
        raise RuntimeError("mat1 and mat2")
    assert "RuntimeError: mat1 and mat2" in folder.log_file.read_text()
    folder.require_new()


@pytest.mark.slow
def test_a_second_start_of_a_run_that_has_finished_meanwhile_leaves_it_as_it_is(make_config):
    config = make_config(run={"updates": 1})
    second = launch.start_run(config)  # both are loaded before either has a folder
    folder = finished(config)
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="already holds a run"), second:
        pytest.fail("the run does not begin")
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
def test_files_that_no_run_has_written_are_neither_replaced_nor_removed(make_config):
    config = make_config()
    folder = RunFolder(config.run.folder / config.run.name)
    folder.path.mkdir(parents=True)
    folder.config_file.write_text("mine = true\n")
    with pytest.raises(ConfigError, match=r"config.toml was not written by a run and would"):
        launch.start_run(config)
    assert folder.config_file.read_text() == "mine = true\n"
    folder.config_file.unlink()
    folder.start(config)  # and killed
    with pytest.raises(KeyboardInterrupt), launch.start_run(config):
        raise KeyboardInterrupt
    assert not folder.path.exists()
    folder.path.mkdir()
    folder.log_file.write_text("my notes\n")
    with pytest.raises(KeyboardInterrupt), launch.start_run(config):
        raise KeyboardInterrupt
    assert [path.name for path in folder.path.iterdir()] == ["log.txt"]
    assert folder.log_file.read_text() == "my notes\n"


def finished(config: Config) -> RunFolder:
    """The folder of a run that has made all its updates."""
    folder, updates = start_run(config)
    list(updates)
    return folder


@pytest.mark.slow
def test_a_run_goes_on_from_its_finished_updates(make_config):
    config = make_config(run={"updates": 1})
    folder = finished(config)
    with (
        pytest.raises(ConfigError, match=r"mat1 .* Finished updates are saved; continue with `.* resume "),
        explained(config, folder),
    ):
        raise RuntimeError("mat1")
    message = r"These need less: rollout.images_at_once = .*, then `.* resume .* A new run can also use "
    with pytest.raises(ConfigError, match=message) as caught, explained(config, folder):
        raise torch.OutOfMemoryError("no memory")
    assert "lora.rank" not in str(caught.value).split("A new run")[0]


@pytest.mark.parametrize("kind", [RunError, RewardError, FloatingPointError])
def test_a_failure_of_the_first_update_does_not_speak_of_resuming(tmp_path, kind):
    with (
        pytest.raises(
            ConfigError, match=r"^Fix the reward\. No update was finished, so the same command starts anew\.$"
        ),
        explained(Config(), RunFolder(tmp_path / "run")),
    ):
        raise kind("Fix the reward.")


@pytest.mark.slow
def test_what_the_loop_says_of_failed_scores_holds_for_the_first_update_and_for_later_ones(make_config):
    with pytest.raises(RunError) as first:
        check_failures({"colorfulness": torch.full((2,), torch.nan)}, {"colorfulness": Reward()}, make_config(), 1)
    assert str(first.value).endswith("max_failed = 0.5 allows. Fix the reward.") and "resume" not in str(first.value)
    config = make_config(run={"updates": 1})
    folder = finished(config)
    with (
        pytest.raises(ConfigError, match=r"Fix the reward\. Finished updates are saved; continue with `.* resume "),
        explained(config, folder),
    ):
        raise first.value


def test_out_of_memory_in_the_first_update_names_every_way(tmp_path):
    with (
        pytest.raises(ConfigError, match=r"lora.rank\. No update was finished: start again with them\.$"),
        explained(Config(), RunFolder(tmp_path / "run")),
    ):
        raise torch.OutOfMemoryError("no memory")


@pytest.mark.slow
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), RuntimeError("mat1")])
def test_an_error_of_the_model_while_a_checkpoint_is_written_is_not_one_of_the_disk(make_config, monkeypatch, error):
    run = launch.start_run(make_config(run={"updates": 1}))

    def fail():
        raise error

    with pytest.raises(type(error), match=str(error)), run:
        updates = list(align(run.state, run.job))
        monkeypatch.setattr(run.state.policy, "lora", fail)
        run.keep(updates[0])
    assert run.folder.checkpoints.numbers() == []


def test_a_reward_that_is_out_of_memory_is_told_its_own_settings(tmp_path):
    folder, error = RunFolder(tmp_path / "run"), torch.OutOfMemoryError("reward hpsv2: no memory")
    advice = memory_advice(build({"reward": {"offload": False}}, "test"), folder, error)
    assert advice.startswith("out of memory with reward.images_at_once = 16: reward hpsv2: no memory.")
    for way in ("reward.images_at_once = 8", "reward.offload = true", 'reward.device = "cpu"', "reward.precision ="):
        assert way in advice
    assert "rollout" not in advice and "lora" not in advice
    assert "reward.offload" not in memory_advice(Config(), folder, error)


def test_a_sharded_model_that_is_out_of_memory_is_not_told_to_quantize(tmp_path):
    sharded = memory_advice(build({"model": {"shard": True}}, "test"), RunFolder(tmp_path / "run"), ValueError("full"))
    assert "quantize" not in sharded
    assert 'model.quantize = "fp8"' in memory_advice(Config(), RunFolder(tmp_path / "run"), ValueError("full"))
