"""The run folder: whatever ends a run, it goes on to the same numbers as one that was not ended."""

import json
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from running import resume_run, start_run
from safetensors.torch import load_file

from trainer.config.loading import merge
from trainer.config.schema import ConfigError
from trainer.loop.align import Update
from trainer.policy.lora_pairs import read_lora
from trainer.runs.folder import RunFolder

pytestmark = pytest.mark.slow

AVERAGE = {"optimizer": {"ema_decay": 0.9, "ema_every": 1}}
WINDOW = {"advantage": {"kind": "window", "window": 4, "min_count": 2}, "reward": {"standardise": False}}
KILLED = """
import os, sys, signal, torch
from pathlib import Path
from trainer.config.loading import load
from running import start_run
torch.set_num_threads(1)
calls = []
def tick():
    calls.append(1)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
list(start_run(load(Path(sys.argv[1])), tick)[1])
"""
COMMAND = (  # a shell that starts us in the background has us ignore Ctrl-C; a terminal does not
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from trainer.cli.main import main; sys.exit(main(sys.argv[1:]))"
)


def train(config, tick=lambda: None) -> RunFolder:
    folder, updates = start_run(config, tick)
    list(updates)
    return folder


def resume(folder: RunFolder, **how) -> RunFolder:
    folder, _, updates = resume_run(folder.path, **how)
    list(updates)
    return folder


def rows(folder: RunFolder) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith("seconds_")} for row in folder.records()]


def assert_same_run(one: RunFolder, other: RunFolder):
    """Bitwise: metrics, LoRA, optimizer and window of the latest checkpoint."""
    assert rows(one) == rows(other)
    a, b = one.checkpoint(), other.checkpoint()
    assert a.name == b.name
    left, right = load_file(a / "lora.safetensors"), load_file(b / "lora.safetensors")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    states = [torch.load(c / "optimizer.pt", weights_only=True)["state"] for c in (a, b)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][i][k], states[1][i][k]) for i in states[0] for k in states[0][i])
    assert json.loads((a / "state.json").read_text()) == json.loads((b / "state.json").read_text())
    assert a.joinpath("manifest.json").read_bytes() == b.joinpath("manifest.json").read_bytes()
    assert one.lora_file.read_bytes() == other.lora_file.read_bytes()


@pytest.mark.parametrize("sections", [{}, WINDOW, AVERAGE], ids=["group", "window", "average"])
def test_a_resumed_run_equals_an_uninterrupted_one(make_config, model, sections):
    """Interrupted between two optimizer steps of update 3, with a checkpoint after every update."""
    common = merge({"optimizer": {"minibatches": 2}, "objective": {"kl_every": 1}}, sections)
    whole = train(make_config(model, run={"name": "whole", "updates": 4, "save_every": 100}, **common))
    calls = []

    def stop():
        calls.append(1)
        if len(calls) == 44:
            raise KeyboardInterrupt

    config = make_config(model, run={"name": "parts", "updates": 4, "save_every": 100}, **common)
    with pytest.raises(KeyboardInterrupt):
        train(config, stop)
    parts = RunFolder(config.run.folder / "parts")
    assert parts.checkpoints.numbers() == [2]
    assert_same_run(whole, resume(parts))


def test_a_run_that_was_killed_goes_on_to_the_same_numbers(make_config, script, tmp_path):
    watched = {"objective": {"kl_every": 1}}  # every update has the same number of model calls
    whole = train(make_config(run={"name": "whole", "updates": 3, "save_every": 2}, **WINDOW, **watched))
    file = tmp_path / "config.toml"
    file.write_text(whole.config_file.read_text().replace('"whole"', '"killed"'))
    process = script(KILLED, file, 26)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, errors
    killed = RunFolder(whole.path.parent / "killed")
    with killed.metrics_file.open("a") as out:
        out.write('{"update": 3, "reward_me')  # and as if it had died while writing
    assert_same_run(whole, resume(killed))


def test_a_run_resumes_without_the_lora_that_it_started_from(make_config, tmp_path):
    """The start LoRA also has modules that lora.targets leaves out; the checkpoint has them all."""
    wide = train(make_config(run={"name": "wide", "updates": 1}, lora={"targets": "linear"}))
    start = tmp_path / "start.safetensors"
    shutil.copy(wide.lora_file, start)
    lora = {"targets": "attention", "start": str(start)}
    whole = train(make_config(run={"name": "whole", "updates": 2}, lora=lora))
    parts = train(make_config(run={"name": "parts", "updates": 1}, lora=lora))
    start.unlink()
    resume(parts, updates=2)
    assert rows(parts) == rows(whole)
    one, other = (load_file(folder.checkpoint() / "lora.safetensors") for folder in (parts, whole))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_killed_before_its_first_checkpoint_starts_over(make_config):
    whole = train(make_config(run={"name": "whole"}))
    config = make_config(run={"name": "early"})
    early = RunFolder(config.run.folder / "early")
    early.path.mkdir()
    early.start(config)
    early.metrics_file.write_text((whole.metrics_file).read_text().splitlines()[0] + "\n")
    assert_same_run(whole, resume(early))


def test_ctrl_c_writes_a_checkpoint_and_says_how_to_go_on(make_config, script, tmp_path):
    arguments = ["--run.folder", tmp_path, "--run.name", "stopped", "--run.updates", 1000, "--run.save-every", 1000]
    arguments += ["--prompts.lines", '["a fox"]', "--rollout.prompts-per-update", 1, "--rollout.group-size", 2]
    arguments += ["--rollout.steps", 2, "--reward.weights", "{colorfulness = 1}", "--model.device", "cpu"]
    process = script(COMMAND, "train", *arguments)
    folder = RunFolder(tmp_path / "stopped")
    deadline = time.monotonic() + 240
    while not folder.records() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    latest = folder.checkpoint()
    assert str(latest.resolve()) in out
    assert f"python -m trainer resume {folder.path}" in out
    assert [row["update"] for row in folder.records()] == list(range(1, int(latest.name) + 1))


def test_a_finished_run_is_not_resumed_but_goes_on_with_more_updates(make_config):
    whole = train(make_config(run={"name": "whole", "updates": 3}))
    folder = train(make_config(run={"name": "more", "updates": 2}))
    with pytest.raises(ConfigError, match=r"finished: 2 of 2 updates are done. Give --updates"):
        resume_run(folder.path)
    assert_same_run(whole, resume(folder, updates=3))
    assert folder.config().run.updates == 3


@pytest.mark.parametrize("sections", [{}, AVERAGE], ids=["plain", "average"])
def test_the_lora_of_a_run_resumed_from_an_older_checkpoint_is_the_older_one(make_config, sections):
    def stop():
        raise KeyboardInterrupt

    short = train(make_config(run={"name": "short", "updates": 1}, **sections))
    folder = train(make_config(run={"updates": 3}, **sections))
    with pytest.raises(KeyboardInterrupt):
        list(resume_run(folder.path, "1", tick=stop)[2])
    own, expected = read_lora(folder.lora_file), read_lora(short.lora_file)
    assert own[1]["pcpo.updates"] == "1"
    assert all(torch.equal(own[0][key], expected[0][key]) for key in expected[0])


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"objective": {"name": "nft", "levels": 20}}, r"objective.levels: .*20"),
        ({"rollout": {"branch": 3}, "objective": {"last_step": False}}, r"rollout.branch: a branch has 3 stochastic"),
        ({"rollout": {"method": "ddim"}}, r"rollout: method is 'ddim' on a flow grid"),
        ({"rollout": {"target_weight": 4.5}}, r"rollout: target_weight is 4.5, .*, or no target_weight"),
    ],
)
def test_steps_that_cannot_be_planned_are_refused_before_the_folder_is_made(make_config, sections, message):
    config = make_config(**sections)
    with pytest.raises(ConfigError, match=message):
        start_run(config)
    assert not (config.run.folder / "run").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"is not a run: it has no config.toml"):
        resume_run(tmp_path)


def test_a_damaged_configuration_is_named(make_config, tmp_path):
    (tmp_path / "config.toml").write_text("[run\n")
    with pytest.raises(ConfigError, match=r"config.toml is damaged"):
        resume_run(tmp_path)


def test_a_second_run_of_one_name_is_refused(make_config):
    folder = train(make_config(run={"updates": 1}))
    before = folder.metrics_file.read_text()
    with pytest.raises(ConfigError, match=r"already holds a run. Continue it with .*resume"):
        train(make_config(run={"updates": 1}))
    assert folder.metrics_file.read_text() == before


def test_a_second_process_on_the_same_folder_is_refused(make_config):
    config = make_config(run={"updates": 2})
    _, first = start_run(config)
    next(first)
    with pytest.raises(ConfigError, match=r"is in use by another process"):
        train(config)
    first.close()  # type: ignore[attr-defined]
    assert RunFolder(config.run.folder / "run").checkpoints.numbers() == [1]


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        place = len(content) * 3 // 4
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])


@pytest.mark.parametrize("file", ["lora.safetensors", "optimizer.pt", "state.json", "manifest.json"])
@pytest.mark.parametrize("how", ["truncated", "missing", "one bit"])
def test_a_damaged_file_of_a_checkpoint_is_found_before_anything_is_used(make_config, tmp_path, file, how):
    source = finished(make_config, tmp_path)
    damage(source.checkpoints.path / "000002" / file, how)
    if file == "manifest.json" and how == "missing":  # as in checkpoints of version 0.1, which have none
        assert source.intact() == 2
        return
    if file == "manifest.json" and how == "one bit":
        damage(source.checkpoints.path / "000002" / file, "truncated")
    with pytest.raises(ConfigError, match=r"checkpoint .*000002 is damaged: .* Use --checkpoint 1"):
        source.intact("2")
    with pytest.warns(UserWarning, match=r"000002 is damaged: .* The run goes on from update 1 instead"):
        assert source.intact() == 1
    damage(source.checkpoints.path / "000001" / "state.json", "one bit")
    with pytest.raises(ConfigError, match=r"is damaged: .* No older one is intact"):
        source.intact()
    assert [row["update"] for row in source.records()] == [1, 2]


@pytest.mark.filterwarnings("ignore:checkpoint")
def test_a_run_whose_latest_checkpoint_is_damaged_goes_on_from_an_older_one(make_config, tmp_path):
    folder = finished(make_config, tmp_path)
    whole = resume(RunFolder(Path(shutil.copytree(folder.path, tmp_path / "whole"))), updates=3)
    damage(folder.checkpoints.path / "000002" / "optimizer.pt", "one bit")
    assert_same_run(whole, resume(folder, updates=3))


_finished: dict[str, Path] = {}


def finished(make_config, tmp_path) -> RunFolder:
    """A copy of one run of two updates."""
    if "run" not in _finished or not _finished["run"].exists():
        _finished["run"] = train(make_config(run={"name": "original"})).path
    copy = RunFolder(tmp_path / "copy")
    shutil.copytree(_finished["run"], copy.path)
    return copy


def test_resuming_from_an_older_checkpoint_puts_newer_ones_aside(make_config, tmp_path):
    folder = finished(make_config, tmp_path)
    whole = resume(RunFolder(Path(shutil.copytree(folder.path, tmp_path / "whole"))), updates=3)
    (folder.checkpoints.path / "000002" / "optimizer.pt").write_bytes(b"")
    _, _, updates = resume_run(folder.path, "1", 3)
    updates.close()  # type: ignore[attr-defined]
    _, _, updates = resume_run(folder.path, "1", 3)
    assert next(updates).number == 2
    assert (folder.checkpoints.path / "000002.old").is_dir()
    updates.close()  # type: ignore[attr-defined]
    assert_same_run(whole, resume(folder))


def test_checkpoints_are_found_by_number_latest_and_best(make_config, tmp_path):
    folder = finished(make_config, tmp_path)
    assert folder.checkpoint().name == "000002"
    assert folder.checkpoint("1").name == "000001"
    assert folder.checkpoint("best").name == "000001"  # the latest is not rated yet
    with pytest.raises(ConfigError, match=r"checkpoint 7 is not in .* There are 1, 2"):
        folder.checkpoint("7")
    with pytest.raises(ConfigError, match=r"empty is not a run: it has no config.toml"):
        RunFolder(tmp_path / "empty").checkpoint()
    shutil.rmtree(folder.checkpoints.path)
    with pytest.raises(ConfigError, match="has no checkpoint yet"):
        folder.checkpoint()


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on file sizes")
@pytest.mark.parametrize("limit", [1_000, 100_000])
def test_a_full_disk_stops_the_run_and_earlier_checkpoints_are_whole(make_config, limit):
    """A limit on file sizes: writing beyond it fails as it does on a full disk."""
    import resource

    whole = train(make_config(run={"name": "whole", "updates": 2}))
    assert (whole.checkpoint() / "optimizer.pt").stat().st_size > limit
    config = make_config(run={"name": "full"})
    folder, updates = start_run(config)
    next(updates)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(ConfigError, match=r"could not be written.* checkpoints are intact\. Use another disk"):
            next(updates)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert folder.checkpoints.numbers() == [1]
    assert not list(folder.checkpoints.path.glob("*.tmp"))
    assert_same_run(whole, resume(folder))


def test_a_run_that_was_killed_after_its_last_checkpoint_is_completed_by_resume(make_config, tmp_path):
    folder = finished(make_config, tmp_path)
    folder.curves_file.unlink()
    (folder.checkpoints.path / "000001.gone").mkdir()
    with pytest.raises(ConfigError, match="finished: 2 of 2"):
        resume_run(folder.path)
    assert folder.curves_file.is_file()
    assert sorted(p.name for p in folder.checkpoints.path.iterdir()) == ["000001", "000002"]


def steps_shown(folder: RunFolder) -> list[int]:
    """The updates that TensorBoard shows the reward of."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder.path / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars("reward_mean")]


def test_tensorboard_shows_each_update_once_after_a_resume_from_an_earlier_checkpoint(make_config):
    pytest.importorskip("tensorboard")
    folder = train(make_config(run={"updates": 3, "tensorboard": True}))
    assert steps_shown(folder) == [1, 2, 3]
    resume(folder, which="1", updates=2)
    assert steps_shown(folder) == [1, 2]


def test_a_run_without_a_finished_update_leaves_no_folder(make_config):
    pytest.importorskip("tensorboard")

    def stop():
        raise KeyboardInterrupt

    config = make_config(run={"tensorboard": True})
    with pytest.raises(KeyboardInterrupt):
        train(config, stop)
    assert not (config.run.folder / "run").exists()


def test_the_last_the_best_and_landmark_checkpoints_stay(tmp_path, make_config):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.rewrite_config(make_config(run={"save_every": 1}))
    rewards = {98: 0.0, 99: 9.0, 100: 1.0, 101: 0.0, 102: 0.0, 103: 0.0}  # a row rates the LoRA of the update before
    folder.metrics_file.write_text("".join(
        json.dumps({"update": n, "rewards": {"colorfulness": reward}}) + "\n" for n, reward in rewards.items()
    ))  # fmt: skip
    for number in (97, 98, 99, 100, 101, 102, 103):
        folder.checkpoints.folder(number).mkdir(parents=True)
    folder.prune(2, 97)
    assert folder.checkpoints.numbers() == [97, 98, 100, 102, 103]  # the guard's, the best, a landmark, the last two
    folder.prune(0, None)
    assert len(folder.checkpoints.numbers()) == 5


@pytest.mark.slow
def test_images_are_drawn_of_the_first_update_and_every_few(make_config):
    run = start_run(make_config(run={"updates": 5, "preview_every": 2}))
    list(run[1])
    assert sorted(file.stem for file in run[0].grids.iterdir()) == ["000001", "000002", "000004"]


def test_a_groups_images_are_drawn_from_the_best_to_the_worst(tmp_path):
    values = torch.tensor([0.2, 0.8, 0.5])
    images = values[:, None, None, None].expand(-1, 64, 64, 3).contiguous()
    folder = RunFolder(tmp_path)
    drawn = np.asarray(Image.open(folder.draw(Update(1, {}, images, ["a fox"] * 3, values), 3)).convert("L"), float)
    row = drawn[drawn.shape[0] // 2]
    shades = [255 * v for v in (0.8, 0.5, 0.2)]
    places = [np.flatnonzero(np.abs(row - shade) < 4).mean() for shade in shades]
    assert places == sorted(places)
