"""Small benchmark grids: their form, results written by hand, and one run interrupted."""

import dataclasses
import json

import pytest

from benchmarks.study.grid import Cell, Task, cell_config, configuration, read_result
from benchmarks.study.methods import FORMS, REWARDS, Form
from benchmarks.study.work import run_if_free
from trainer.runs.folder import RunFolder

TASK = Task("flow-grpo", "colorfulness")


def small(**changes: object) -> Form:
    """The smallest grid that still has something to choose and two contenders."""
    tiny = {"contenders": ("ppo", "pcpo"), "seeds": (0,), "tasks": (("flow-grpo", "colorfulness"),)}
    sizes = {"group_size": 2, "prompts_per_update": 1, "steps": 3, "updates": 2, "every": 1, "each": 2, "reference": 16}
    return dataclasses.replace(FORMS["quick"], **{**tiny, **sizes, **changes})


def write(cell: Cell, form: Form, out, gain: float, kept: float = 1.0) -> None:
    """A finished cell on a straight line to `gain`, with a share `kept` of right objects at its end."""
    folder = cell.folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    same = {"fd_base": 100.0, "fd_drawn": 200.0, "diversity": 0.1, "object": 1.0, "count": 1.0, "alignment": 0.5}
    rewards = {f"{name}{part}": value for name in REWARDS for part, value in (("", 0.5), ("_std", 0.1))}
    rows = [{"update": u, **rewards, **same, "fd_base": 100 + u} for u in (0, 5, 10)]
    rows[1]["polish"] = 0.6
    rows[-1]["object"] = kept
    result = {
        "updates": [0, 5, 10],
        "gains": [0, gain / 2, gain],
        "rows": rows,
        "seconds_per_update": 2.0,
        "commit": "c",
        "config": configuration(cell_config(cell, form, out)),
    }
    (folder / "result.json").write_text(json.dumps(result))
    step = {"steps": [0, 1], "clip_fraction": [0.1, 0.3], "grad_norm": [1.0, 2.0], "taylor_error": [1e-6, 1e-6]}
    lines = [
        {"update": u, "reward_mean": u / 10, "clip_fraction": 0.2, "grad_norm": 1.0 + u % 2, "per_step": step}
        for u in range(1, 11)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def interrupted(cell: Cell, form: Form, out, monkeypatch) -> RunFolder:
    """The cell's folder after its first checkpoint."""
    saved = RunFolder.save

    def stop(self, state, config):
        saved(self, state, config)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            run_if_free(cell, form, out, lambda text: None)
    assert read_result(cell, form, out) is None
    return RunFolder(cell.folder(out))
