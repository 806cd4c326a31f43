"""Small studies for the tests: handwritten results, and an interrupted run."""

import dataclasses
import json

import pytest

from benchmarks.study.cell_config import cell_config, evaluation_identity, identity
from benchmarks.study.grid import Cell, StudyTask, reported_cells, study_tasks, task_methods
from benchmarks.study.recipes import STUDY_REWARDS
from benchmarks.study.studies import STUDIES, Rung, Setting, Study, settings
from benchmarks.study.tuning import read_result, tune
from benchmarks.study.work import run_if_free
from comfyui_pcpo.tiny.tinyeval import HARD
from trainer.runs.folder import RunFolder

TASK = StudyTask("flow-grpo", "colorfulness")
SETTING = STUDIES["quick"].sweep["flow"][0]
NINE = {"flow": settings((1e-3, 1e-2, 1e-1), (0.0, 0.1, 1.0))}  # a sweep
ONE_SEED = (Rung(100, 9),)


def small(**changes: object) -> Study:
    """The smallest study with two methods."""
    tiny = {"methods": ("ppo", "pcpo"), "seeds": (0,), "tasks": (("flow-grpo", "colorfulness"),)}
    sizes = {"group_size": 2, "prompts_per_update": 1, "steps": 3, "updates": 2}
    sizes |= {"evaluate_every": 1, "images": 16, "reference_images": 16, "tinyeval_prompts": 1}
    return dataclasses.replace(STUDIES["quick"], **{**tiny, **sizes, **changes})


def evaluations(gain: float, diversity: float = 1.0, distance: float = 1.0, hard: float = 0.5) -> list[dict]:
    """Three evaluations on straight lines to these ends: the gain in deviations, what is left of the diversity, the
    multiple of the distance, the share of right images of the hard tasks; 200 model evaluations per update."""
    rows = []
    for update in (0, 5, 10):
        part = update / 10
        rewards = {f"{name}{end}": value for name in STUDY_REWARDS for end, value in (("", 0.5), ("_std", 0.1))}
        rewards |= {name: 0.5 + 0.1 * gain * part for name in ("colorfulness", "tinyeval")}
        images = {"fd_base": 100 * (1 + part * (distance - 1)), "diversity": 0.2 * (1 + part * (diversity - 1))}
        shares = dict.fromkeys((*HARD, "hard tasks"), 0.5 + part * (hard - 0.5))
        spent = {"model_evaluations": 200 * update, "images": 16 * update, "cpu_seconds": 2.0 * update}
        rows.append({"update": update, **spent, **rewards, **images, "right": 1.0, "tinyeval_shares": shares})
    return rows


def write(cell: Cell, study: Study, out, gain: float, **ends: float) -> None:
    """A finished cell whose evaluations are straight lines to their ends."""
    folder = cell.folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    result = {
        "cell": {"task": cell.task.name, "method": cell.method, "seed": cell.seed},
        "setting": dataclasses.asdict(cell.setting),
        "rows": evaluations(gain, **ends),
        "commit": "c",
        "config": identity(cell_config(cell, study, out)),
        "evaluation": evaluation_identity(study, study.reads_tinyeval(cell.seed)),
    }
    (folder / "result.json").write_text(json.dumps(result))
    step = {"steps": [0, 1], "clip_fraction": [0.1, 0.3], "grad_norm": [1.0, 2.0]}
    lines = [{"update": u, "advantage_abs_max": 1.0, "per_step": step} for u in range(1, 11)]
    for line in lines[4::5]:  # what the guard measured, on the same straight lines
        lost = {"polish": -0.1, "diversity": line["update"] / 10 * (1 - ends.get("diversity", 1.0))}
        line["guard"] = {"reward": gain * line["update"], "lost": lost, "model_evaluations": 250}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def fill(study: Study, out, gain, **ends: float) -> None:
    """Write results for all cells; gain(cell) is the gain at the end."""
    for task in study_tasks(study):
        for method in task_methods(study, task):
            while due := tune(study, task, method, out).due:
                for cell in due:
                    write(cell, study, out, gain(cell), **ends)
            for cell in reported(study, out, task, method):
                write(cell, study, out, gain(cell), **ends)


def reported(study: Study, out, task: StudyTask = TASK, method: str = "ppo") -> list[Cell]:
    """The reported cells of a method whose tuning is finished."""
    chosen = tune(study, task, method, out).chosen
    assert isinstance(chosen, Setting)
    return reported_cells(study, task, method, chosen)


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
