"""Small studies for the tests: handwritten results, and an interrupted run."""

import dataclasses
import itertools
import json

import pytest

from benchmarks.study.cell_config import cell_config, identity
from benchmarks.study.grid import Cell, StudyTask, reported_cells, tuning_cells
from benchmarks.study.recipes import STUDY_REWARDS
from benchmarks.study.studies import STUDIES, Study
from benchmarks.study.tuning import choose, read_result
from benchmarks.study.work import run_if_free
from trainer.runs.folder import RunFolder

TASK = StudyTask("flow-grpo", "colorfulness")
FOUR = {"flow": tuple(itertools.product((1e-3, 1e-2), (1e-4, 1e-3)))}  # settings


def small(**changes: object) -> Study:
    """The smallest study with two methods."""
    tiny = {"methods": ("ppo", "pcpo"), "seeds": (0,), "tasks": (("flow-grpo", "colorfulness"),)}
    sizes = {"group_size": 2, "prompts_per_update": 1, "steps": 3, "updates": 2}
    sizes |= {"evaluate_every": 1, "images_per_prompt": 2, "reference_images": 16}
    return dataclasses.replace(STUDIES["quick"], **{**tiny, **sizes, **changes})


def write(cell: Cell, study: Study, out, gain: float, kept: float = 1.0) -> None:
    """A finished cell on a straight line to `gain`, with a share `kept` of correct objects at its end."""
    folder = cell.folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    same = {"fd_base": 100.0, "fd_drawn": 200.0, "diversity": 0.1, "object": 1.0, "count": 1.0, "alignment": 0.5}
    rewards = {f"{name}{part}": value for name in STUDY_REWARDS for part, value in (("", 0.5), ("_std", 0.1))}
    rows = [{"update": u, **rewards, **same, "fd_base": 100 + u} for u in (0, 5, 10)]
    rows[1]["polish"] = 0.6
    rows[-1]["object"] = kept
    result = {
        "updates": [0, 5, 10],
        "gains": [0, gain / 2, gain],
        "rows": rows,
        "seconds_per_update": 2.0,
        "commit": "c",
        "config": identity(cell_config(cell, study, out)),
    }
    (folder / "result.json").write_text(json.dumps(result))
    step = {"steps": [0, 1], "clip_fraction": [0.1, 0.3], "grad_norm": [1.0, 2.0], "taylor_error": [1e-6, 1e-6]}
    lines = [
        {"update": u, "reward_mean": u / 10, "clip_fraction": 0.2, "grad_norm": 1.0 + u % 2, "per_step": step}
        for u in range(1, 11)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def fill(study: Study, out, gain) -> None:
    """Write results for all cells; gain(cell) is the gain at the end, on a straight line."""
    for task in map(lambda t: StudyTask(*t), study.tasks):
        for cell in [*tuning_cells(study, task), *reported_cells(study, task, choose(study, task, out) or {})]:
            write(cell, study, out, gain(cell))
        for cell in reported_cells(study, task, choose(study, task, out) or {}):
            write(cell, study, out, gain(cell))


def interrupted(cell: Cell, study: Study, out, monkeypatch) -> RunFolder:
    """A cell interrupted after its first checkpoint, -> its folder."""
    saved = RunFolder.save

    def stop(self, state, config):
        saved(self, state, config)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            run_if_free(cell, study, out, lambda text: None)
    assert read_result(cell, study, out) is None
    return RunFolder(cell.folder(out))
