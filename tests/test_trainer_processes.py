"""Two processes train what one process trains."""

import socket

import torch
from safetensors.torch import load_file

from trainer.config import dump
from trainer.run import RunFolder
from trainer.train import start_run

WORKER = """
import os, sys, torch
from pathlib import Path
from trainer.config import load
from trainer.cli import Bar, main
torch.set_num_threads(1)
calls, after = [], int(sys.argv[2])
tick = Bar.tick
def failing(self):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == after:
        os._exit(9)
    tick(self)
Bar.tick = failing
sys.exit(main(["train", sys.argv[1]]))
"""


def launch(script, file, after=0):
    """Both processes as a launcher starts them, -> [(exit status, output, errors)]."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [script(WORKER, file, after, RANK=str(r), LOCAL_RANK=str(r), **common) for r in range(2)]
    found = []
    for process in processes:
        out, errors = process.communicate(timeout=300)
        found.append((process.returncode, out, errors))
    return found


def config_file(make_config, tmp_path, name, **sections):
    config = make_config(
        rollout={"prompts_per_update": 2, "group_size": 4, "images_at_once": 2},
        optimizer={"minibatches": 2},
        run={"name": name, "updates": 2},
        **sections,
    )
    path = tmp_path / f"{name}.toml"
    path.write_text(dump(config))
    return config, path


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

    left, right = load_file(one.lora_file), load_file(two.lora_file)
    assert left.keys() == right.keys()
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=0, atol=1e-6)
    assert len(two.log_file.read_text().splitlines()) == 2
    for a, b in zip(one.records(), two.records(), strict=True):
        for key in ("reward_mean", "reward_groups", "advantage_abs_max", "loss", "grad_norm", "log_ratio_abs_max"):
            torch.testing.assert_close(torch.tensor(a[key]), torch.tensor(b[key]), rtol=1e-4, atol=1e-8)


def test_a_process_that_dies_ends_all_and_loses_no_finished_update(make_config, script, tmp_path):
    config, file = config_file(make_config, tmp_path, "dying", objective={"kl_images": 0})
    # of each update's calls (3 steps x 2 chunks in the rollout, the same in the training) the second update's fourth
    (main, _, errors), (second, _, _) = launch(script, file, after=16)
    assert second == 9
    assert main != 0, errors
    assert RunFolder(config.run.folder / "dying").numbers() == [1]


def test_prompts_that_do_not_split_over_the_processes_are_refused(make_config, script, tmp_path):
    _, file = config_file(make_config, tmp_path, "odd")
    file.write_text(file.read_text().replace("prompts_per_update = 2", "prompts_per_update = 3"))
    for status, _, errors in launch(script, file):
        assert status == 2
        assert "prompts_per_update 3 does not split over 2 processes. Use a multiple of 2." in errors
