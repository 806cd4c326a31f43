"""A user's own reward that never returns can be interrupted, and is named while it computes."""

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from comfyui_pcpo.reward import Reward, RewardError, RewardSettings
from comfyui_pcpo.reward import worker as worker_module
from trainer.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
IMAGES = torch.rand(2, 8, 8, 3)


class Stop(Exception):
    """What a host's tick raises."""


class Slow(Reward):
    """Waits for `go` where Python cannot be interrupted."""

    name = "slow"

    def __init__(self, tick=lambda: None):
        super().__init__(RewardSettings(tick=tick))
        self.go, self.threads, self.modes = threading.Event(), [], []

    def build(self):
        self.threads.append(threading.current_thread())

    def score_batch(self, images, prompts):
        self.threads.append(threading.current_thread())
        self.modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        self.go.wait(30)
        return images.float().mean((1, 2, 3))


def test_a_tick_that_raises_abandons_a_reward_at_once_and_the_next_call_works():
    ticks = []

    def tick():
        ticks.append(1)
        if len(ticks) == 2:
            raise Stop

    reward, start = Slow(tick), time.monotonic()
    with pytest.raises(Stop):
        reward.score(IMAGES, ["", ""])
    assert time.monotonic() - start < 5
    first = reward.threads[-1]
    assert first.is_alive()  # the call goes on
    other = threading.Timer(0.2, reward.go.set)
    other.start()
    assert len(reward.score(IMAGES, ["", ""])) == 2
    assert reward.threads[-1] is not first


def test_a_reward_that_computes_for_long_is_named(monkeypatch, caplog):
    monkeypatch.setattr(worker_module, "NOTICE", 0.3)
    reward = Slow()
    threading.Timer(1.0, reward.go.set).start()
    with caplog.at_level("WARNING", "comfyui_pcpo"):
        reward.score(IMAGES, ["", ""])
    assert "reward slow has been computing for 0 s" in caplog.text
    assert len(caplog.records) == 2  # after 0.3 s and 0.6 s


def test_all_calls_of_a_reward_have_one_thread_and_the_modes_of_the_caller():
    reward = Slow()
    reward.go.set()
    with torch.inference_mode():
        reward.score(IMAGES, ["", ""])
    reward.score(IMAGES, ["", ""])
    assert reward.modes == [(True, False), (False, False)]
    assert len(set(reward.threads)) == 1 and reward.threads[0] is not threading.current_thread()


def test_a_reward_may_score_with_itself():
    class Twice(Slow):
        def score_batch(self, images, prompts):
            if len(prompts) == 1:
                return super().score_batch(images, prompts)
            return torch.cat([self.score(image[None] / 255, [""]) for image in images])

    reward = Twice()
    reward.go.set()
    assert len(reward.score(IMAGES, ["", ""])) == 2


@pytest.mark.parametrize("error", [TimeoutError("late"), SystemExit(3), KeyError("x")])
def test_what_a_reward_raises_in_its_thread_is_named(error):
    class Raises(Slow):
        def score_batch(self, images, prompts):
            raise error

    with pytest.raises(RewardError, match=rf"reward slow raised {type(error).__name__}.*test_worker.py, line \d+"):
        Raises().score(IMAGES, ["", ""])


def test_a_forgotten_reward_leaves_no_thread():
    reward = Slow()
    reward.go.set()
    reward.score(IMAGES, ["", ""])
    thread = reward.threads.pop()
    reward.threads.clear()
    del reward
    thread.join(5)
    assert not thread.is_alive()


NEVER = """
from threading import Event
from comfyui_pcpo.reward import Reward
class Never(Reward):
    name = "never"
    calls, go, hangs = 0, Event(), Event()
    def score_batch(self, images, prompts):
        Never.calls += 1
        while Never.calls > 1 and not self.go.is_set():
            try:
                self.hangs.set()
                self.go.wait(30)
            except BaseException:
                pass
        return images.float().mean((1, 2, 3))
"""


@pytest.mark.slow
def test_ctrl_c_ends_a_run_whose_reward_never_returns_and_keeps_what_is_finished(tmp_path, monkeypatch, capsys):
    """Even where the reward catches everything, as `except:` in a loop does."""
    (tmp_path / "never_returns.py").write_text(NEVER)
    monkeypatch.syspath_prepend(tmp_path)
    reward = importlib.import_module("never_returns").Never

    def press() -> None:
        reward.hangs.wait(30)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    status = main([
        *("train", "--model.device", "cpu", "--prompts.lines", "a fox", "--reward.weights", "never_returns:Never"),
        *("--rollout.prompts-per-update", "1", "--rollout.group-size", "2", "--rollout.steps", "2"),
        *("--run.updates", "3", "--run.folder", str(tmp_path), "--lora.rank", "2"),
    ])  # fmt: skip
    reward.go.set()
    last = capsys.readouterr().out.rstrip().splitlines()[-1]
    assert status == 130 and "000001" in last and "resume" in last, last
    assert (tmp_path / "run" / "checkpoints" / "000001").is_dir()


HUNG = """
import os, signal, sys, threading
import torch
from comfyui_pcpo.reward import Reward
class Never(Reward):
    name = "never"
    def score_batch(self, images, prompts):
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        while True:
            torch.ones(99).sum()
try:
    Never().score(torch.zeros(1, 8, 8, 3), [""])
except KeyboardInterrupt:
    print("interrupted")
    sys.exit(130)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of another process")
def test_a_program_ends_while_an_abandoned_reward_still_computes():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HUNG], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (130, "interrupted\n"), done.stderr
