"""What the trainer's tests share: small configurations of the embedded models, and pictures of one update."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests ask no hub: without a network it is asked for half a minute
ROOT = Path(__file__).resolve().parent.parent
MODELS = ("emoji-flow", "emoji-eps")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first: at the end of a parallel run there are only short ones to share out."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Sums in one order, and no two tests fighting for the same cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """A test that draws numbers without a generator of its own draws the same ones every time."""
    torch.manual_seed(0)


@pytest.fixture(params=MODELS)
def model(request) -> str:
    return request.param


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Any]:
    """config(rollout={...}, ...): the smallest run there is, with sections laid on it."""
    from trainer.config.loading import build, merge

    def config(model: str = "emoji-flow", /, **sections: Any) -> Any:
        small = {
            "model": {"name": model, "device": "cpu"},
            "prompts": {"lines": ["a fox", "a red star", "two frogs"]},
            "rollout": {"prompts_per_update": 1, "group_size": 2, "steps": 3, "height": 64, "width": 64},
            "reward": {"weights": {"colorfulness": 1.0}},
            "objective": {"last_step": True},
            "lora": {"rank": 2},
            "optimizer": {"minibatches": 1, "learning_rate": 1e-3},
            "run": {"name": "run", "folder": str(tmp_path), "updates": 2, "save_every": 1, "preview_every": 0},
        }
        return build(merge(small, sections), "test")

    return config


@pytest.fixture
def learn() -> Callable[..., Any]:
    """learn(config, tick, rewards, waiting=...) -> (state, updates): the loop alone, without a folder."""
    from trainer.loop.align import Job, align
    from trainer.loop.state import make_training_state
    from trainer.policy.loading import make_policy
    from trainer.runs.rewards import make_rewards

    def start(
        config: Any, tick: Callable[[], None] = lambda: None, rewards: dict[str, Any] | None = None, **more: Any
    ) -> Any:
        state = make_training_state(make_policy(config), config)
        job = Job(config, config.prompts.read(), rewards or make_rewards(config), tick=tick, **more)
        return state, align(state, job)

    return start


@pytest.fixture
def script() -> Callable[..., subprocess.Popen[str]]:
    """script(code, *arguments, **environment): another Python with the project on its path, its output captured."""

    def start(code: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
        env = (
            os.environ
            | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests" / "support"))), "OMP_NUM_THREADS": "1"}
            | environment
        )
        return subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            cwd=ROOT,
        )

    return start


@pytest.fixture(scope="session")
def comfyui():
    """One running ComfyUI with this pack, for the tests of its API and of its page."""
    import comfy_server

    found = comfy_server.Server()
    yield found
    found.stop()
