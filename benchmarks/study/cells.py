"""One cell of the grid: an ordinary training run with evaluations; it resumes, and its result is written at once."""

import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from comfyui_pcpo.tiny.align import PIXELS
from trainer.config.schema import Config
from trainer.loop.align import Job, align
from trainer.loop.state import make_training_state
from trainer.policy.base import Policy
from trainer.policy.loading import make_policy
from trainer.runs.folder import RunFolder
from trainer.runs.launch import begin
from trainer.runs.rewards import load_rewards
from trainer.runs.rows import finite

from .cell_config import cell_config, identity, require_same
from .evaluator import Evaluator, make_evaluator
from .files import commit, read_json, write_json
from .grid import Cell, evaluation_updates
from .kept_gain import gain
from .studies import Study

Say = Callable[[str], None]
JOURNAL = "examinations.json"  # the evaluations of a run; the name and the keys are those of archived results
_evaluators: dict[tuple[str, int, int, int], Evaluator] = {}


def run_cell(cell: Cell, study: Study, out: Path, say: Say) -> None:
    """Run what is left of a cell; the caller holds the lock of its folder."""
    start = time.perf_counter()
    folder = RunFolder(cell.folder(out))
    config = cell_config(cell, study, out)
    try:
        rows = run_evaluated(config, folder, study, out)
    except FloatingPointError as error:
        say(f"{cell.task.name} {cell.name}: {error}")
        rows = diverged(read_json(folder.path / JOURNAL, []), study)
    result = cell_result(cell, folder, rows)
    result["config"] = identity(config)
    write_json(folder.path / "result.json", finite(result))
    shutil.rmtree(folder.checkpoints, ignore_errors=True)
    say(f"{cell.task.name} {cell.name}: {result['gains'][-1]:+.2f} std in {time.perf_counter() - start:.0f} s")


def run_evaluated(config: Config, folder: RunFolder, study: Study, out: Path) -> list[dict[str, Any]]:
    """Run, or resume from the last checkpoint, -> one row per evaluation, the first before any update."""
    policy = make_policy(config)
    key = (config.model.name, study.steps, study.images_per_prompt, study.reference_images)
    if key not in _evaluators:
        _evaluators[key] = make_evaluator(policy, study, out / "reference")
    evaluator, state = _evaluators[key], make_training_state(policy, config)
    rows = resumable(folder, config)
    begin(folder, state, config, "latest" if folder.config_file.is_file() else None)
    if not rows:
        rows = [{"update": 0, **base_evaluation(evaluator, policy)}]
        write_json(folder.path / JOURNAL, rows)
    for update in align(state, Job(config, config.prompts.read(), load_rewards(config))):
        folder.record(update)
        if update.number in evaluation_updates(study):
            rows.append({"update": update.number, **evaluator.evaluate_policy(policy)})
            write_json(folder.path / JOURNAL, rows)
            folder.save(state, config)
    return rows


def diverged(rows: list[dict[str, Any]], study: Study) -> list[dict[str, Any]]:
    """Evaluations of a run whose gradient overflowed: after its last one, no image counts as correct."""
    return rows + [
        {**rows[-1], "update": u, "object": 0.0} for u in evaluation_updates(study) if u > rows[-1]["update"]
    ]


def resumable(folder: RunFolder, config: Config) -> list[dict[str, Any]]:
    """Evaluations up to the last checkpoint; a folder that lost some is cleared, so that its run restarts."""
    if folder.config_file.is_file():
        require_same(folder.config(), config, folder.path)
    done = max(folder.numbers(), default=0)
    rows = [row for row in read_json(folder.path / JOURNAL, []) if row["update"] <= done]
    if done and (not rows or rows[-1]["update"] != done):
        clear(folder)
        return []
    return rows


def clear(folder: RunFolder) -> None:
    """Remove everything but the lock file, which the caller holds."""
    for entry in folder.path.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != ".lock":
            entry.unlink()


def base_evaluation(evaluator: Evaluator, policy: Policy) -> dict[str, float]:
    """Evaluation of the model without LoRA, computed once per evaluator."""
    if evaluator.before is None:
        with policy.reference():
            evaluator.before = evaluator.evaluate_policy(policy)
    return evaluator.before


def cell_result(cell: Cell, folder: RunFolder, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Content of result.json: gains in standard deviations over the base model's images, seconds, commit."""
    name, records = cell.task.reward, folder.records()
    parts = ("seconds_rollout", "seconds_reward", "seconds_update")
    return {
        "cell": {"task": cell.task.name, "contender": cell.method, "seed": cell.seed},
        "setting": [cell.learning_rate, cell.clip_range],
        "updates": [row["update"] for row in rows],
        "gains": [gain(row, rows[0], name) for row in rows],
        "rows": rows,
        "seconds_per_update": statistics.median(sum(record[p] for p in parts) for record in records),
        "commit": commit(),
        "pixels": PIXELS,
    }
