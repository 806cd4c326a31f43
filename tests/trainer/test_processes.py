"""Two processes train what one process trains."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from running import start_run
from safetensors.torch import load_file

from trainer.config.loading import dump, merge
from trainer.runs.folder import RunFolder

pytestmark = pytest.mark.slow

WORKER = """
import os, sys, torch
from pathlib import Path
from trainer.config.loading import load
from trainer.cli.main import main
from trainer.cli.progress import Bar
torch.set_num_threads(1)
calls, after = [], int(sys.argv[2])
tick = Bar.tick
def failing(self):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == after:
        os._exit(9)
    tick(self)
Bar.tick = failing
sys.exit(main(sys.argv[3:]))
"""
ROOT = Path(__file__).resolve().parents[2]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def launch(script, file, after=0, command="train", code=WORKER):
    """Both processes as a launcher starts them, -> [(exit status, output, errors)]."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = [script(code, file, after, command, file, RANK=str(r), LOCAL_RANK=str(r), **common) for r in range(2)]
    found = []
    for process in processes:
        out, errors = process.communicate(timeout=300)
        found.append((process.returncode, out, errors))
    return found


def config_file(make_config, tmp_path, name, more=None, **sections):
    small = {
        "rollout": {"prompts_per_update": 2, "group_size": 4, "images_at_once": 2},
        "optimizer": {"minibatches": 2},
        "run": {"name": name, "updates": 2},
        **sections,
    }
    config = make_config(**merge(small, more or {}))
    path = tmp_path / f"{name}.toml"
    path.write_text(dump(config))
    return config, path


def assert_same(one, two, relative=1e-4, absolute=1e-6):
    """LoRA and metrics of two runs' folders, but for the rounding of sums in another order."""
    left, right = load_file(one.lora_file), load_file(two.lora_file)
    assert left.keys() == right.keys()
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=0, atol=absolute)
    for a, b in zip(one.records(), two.records(), strict=True):
        for key in ("reward_mean", "reward_groups", "advantage_abs_max", "loss", "grad_norm", "log_ratio_abs_max"):
            torch.testing.assert_close(torch.tensor(a[key]), torch.tensor(b[key]), rtol=relative, atol=1e-8)


def test_two_processes_give_the_update_of_one(make_config, script, tmp_path):
    window = {"advantage": {"kind": "window", "window": 8, "min_count": 4}}
    config, _ = config_file(make_config, tmp_path, "one", **window)
    one, updates = start_run(config)
    list(updates)
    config, file = config_file(make_config, tmp_path, "two", **window)
    (main, out, errors), (second, silent, more) = launch(script, file)
    assert (main, second) == (0, 0), errors + more
    two = RunFolder(config.run.folder / "two")
    assert str(two.lora_file.resolve()) in out
    assert silent == ""

    assert_same(one, two)
    assert len(two.log_file.read_text().splitlines()) == 2


def test_two_processes_have_the_guard_of_one(make_config, script, tmp_path):
    """It measures the same, keeps the same update, adapts the KL weight alike, and stops both processes."""
    sections = {
        "rollout": {"branch": 1},
        "reward": {"held_out": ["alignment"]},
        "optimizer": {"learning_rate": 0.01},
        "guard": {"every": 1, "prompts": 2, "images": 2, "tolerance": 1e-6, "patience": 2, "kl_budget": 1e-5},
        "run": {"updates": 8},
    }
    config, _ = config_file(make_config, tmp_path, "one", more=sections)
    one, updates = start_run(config)
    list(updates)
    assert len(one.records()) < 8
    config, file = config_file(make_config, tmp_path, "two", more=sections)
    for status, _, errors in launch(script, file):
        assert status == 0, errors
    two = RunFolder(config.run.folder / "two")
    assert_same(one, two, 1e-3, 1e-5)
    for mine, other in zip(one.records(), two.records(), strict=True):
        assert mine["kl_weight"] == other["kl_weight"]
        assert mine["model_evaluations"] == other["model_evaluations"]
        for key in ("reward", "diversity", "distance"):
            assert mine["guard"][key] == pytest.approx(other["guard"][key], rel=1e-3)
        for key in ("kept", "violations"):
            assert mine["guard"][key] == other["guard"][key]


@pytest.mark.parametrize(
    ("family", "precision"), [pytest.param("sd15", "float32", marks=pytest.mark.thorough), ("flux", "bfloat16")]
)
def test_a_model_spread_over_two_processes_trains_as_a_whole_one(make_config, script, tmp_path, family, precision):
    folder = str(tiny_pipelines.save(family, tmp_path / "models"))
    size = {"height": tiny_pipelines.SIDE, "width": tiny_pipelines.SIDE, "cfg": 2.0}

    def config(name, shard):
        model = {"name": folder, "precision": precision, "shard": shard, "gradient_checkpointing": True}
        measured = {"kl_images": 1, "kl_every": 1}  # by one process alone, but the other gathers weights with it
        return config_file(make_config, tmp_path, name, model=model, more={"rollout": size, "objective": measured})

    one, updates = start_run(config("whole", False)[0])
    list(updates)
    spread, file = config("spread", True)
    for status, _, errors in launch(script, file):
        assert status == 0, errors
    two = RunFolder(spread.run.folder / spread.run.name)
    # gathered weights lie elsewhere in memory, which may round sums in another way; a step is 1e-3
    assert_same(one, two, 5e-3, 1e-4)
    assert all(row["first_log_ratio_abs_max"] < 1e-5 for row in two.records())


SHARE = """
import sys, torch
from trainer.config.loading import load
from trainer.loop.distributed import join
from trainer.policy.loading import make_policy
torch.set_num_threads(1)
join()
policy = make_policy(load(__import__("pathlib").Path(sys.argv[1])))
lora = {id(p) for p in policy.trainable()}
frozen = [p for p in policy.denoiser.parameters() if id(p) not in lora]
print(sum(p.to_local().numel() for p in frozen), sum(p.numel() for p in frozen))
"""


def test_each_process_of_a_spread_model_keeps_its_share(make_config, script, tmp_path):
    _, file = config_file(make_config, tmp_path, "share", model={"shard": True})
    found = [tuple(map(int, out.split())) for _, out, _ in launch(script, file, code=SHARE)]
    (left, whole), (right, _) = found
    assert left + right == whole
    assert abs(left - right) < 0.05 * whole


def test_two_processes_that_were_killed_resume_to_the_numbers_of_one(make_config, script, tmp_path):
    quiet = {"objective": {"kl_images": 0}}
    config, _ = config_file(make_config, tmp_path, "one", **quiet)
    one, updates = start_run(config)
    list(updates)
    config, file = config_file(make_config, tmp_path, "killed", **quiet)
    assert launch(script, file, after=16)[1][0] == 9
    killed = RunFolder(config.run.folder / "killed")
    assert killed.checkpoints.numbers() == [1]
    for status, _, errors in launch(script, killed.path, command="resume"):
        assert status == 0, errors
    assert_same(one, killed)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_accelerate_launches_a_run_with_a_shipped_file(make_config, tmp_path, name):
    more = {"model": {"shard": name == "fsdp"}, "run": {"updates": 1}}
    config, file = config_file(make_config, tmp_path, name, more=more)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command = [*launcher, str(ROOT / "configs" / "accelerate" / f"{name}.yaml"), "--cpu", "--num_processes", "2",
               "--main_process_port", free_port(), "-m", "trainer", "train", str(file)]  # fmt: skip
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests/support"))), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    run = RunFolder(config.run.folder / name)
    assert len(run.records()) == 1
    assert done.stdout.count(str(run.lora_file.resolve())) == 1


@pytest.mark.parametrize("dying", [0, 1])
def test_a_process_that_dies_ends_all_with_one_sentence_and_loses_no_finished_update(
    make_config, script, tmp_path, dying
):
    config, file = config_file(make_config, tmp_path, "dying", objective={"kl_images": 0})
    # of each update's calls (3 steps x 2 chunks in the rollout, the same in the training) the second update's fourth
    code = WORKER.replace('os.environ["RANK"] == "1"', f'os.environ["RANK"] == "{dying}"')
    ends = launch(script, file, after=16, code=code)
    assert ends[dying][0] == 9
    status, _, errors = ends[1 - dying]
    assert status == 2, errors
    lines = [line for line in errors.splitlines() if "loading the model" not in line and "Gloo" not in line]
    assert len(lines) == 1 and lines[0].startswith(f"error: process {1 - dying} ends, because another process"), errors
    assert RunFolder(config.run.folder / "dying").checkpoints.numbers() == [1]


def test_prompts_that_do_not_split_over_the_processes_are_refused(make_config, script, tmp_path):
    _, file = config_file(make_config, tmp_path, "odd")
    file.write_text(file.read_text().replace("prompts_per_update = 2", "prompts_per_update = 3"))
    for status, _, errors in launch(script, file):
        assert status == 2
        assert "prompts_per_update 3 cannot be divided among 2 processes. Use a multiple of 2." in errors
