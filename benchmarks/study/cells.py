"""One cell of the grid: an ordinary run of the trainer, examined on the way; resumable, its result written at once."""

import json
import shutil
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from trainer.config.schema import Config
from trainer.loop.align import Job, align
from trainer.loop.state import make_training_state
from trainer.policy.base import Policy
from trainer.policy.loading import make_policy
from trainer.runs.folder import RunFolder, finite
from trainer.runs.launch import begin
from trainer.runs.rewards import load_rewards

from .grid import Cell, cell_config, configuration, exams, gain, require_same
from .measure import Evaluator, make_evaluator
from .methods import Form

ROOT = Path(__file__).resolve().parents[2]
Say = Callable[[str], None]
JOURNAL = "examinations.json"
_examiners: dict[tuple[str, int, int, int], Evaluator] = {}


@cache
def commit(root: Path = ROOT) -> str:
    """The commit that is checked out, or what the file COMMIT says, or unknown; read once, before the code changes."""
    named = root / "COMMIT"
    if named.is_file():
        return named.read_text(encoding="utf-8").strip()[:12]
    git = root / ".git"
    head = (git / "HEAD").read_text(encoding="utf-8").strip() if (git / "HEAD").is_file() else ""
    if not head.startswith("ref: "):
        return head[:12] or "unknown"
    loose, packed = git / head[5:], git / "packed-refs"
    if loose.is_file():
        return loose.read_text(encoding="utf-8").strip()[:12]
    lines = packed.read_text(encoding="utf-8").splitlines() if packed.is_file() else []
    return next((line[:12] for line in lines if line.endswith(head[5:])), "unknown")


def run_cell(cell: Cell, form: Form, out: Path, say: Say) -> None:
    """Run what is left of a cell; its folder is locked by the caller."""
    start = time.perf_counter()
    folder = RunFolder(cell.folder(out))
    config = cell_config(cell, form, out)
    try:
        rows = run_examined(config, folder, form, out)
    except FloatingPointError as error:
        say(f"{cell.task.name} {cell.name}: {error}")
        rows = lost_from_here(read_json(folder.path / JOURNAL, []), form)
    result = summary(cell, folder, rows)
    result["config"] = configuration(config)
    write_json(folder.path / "result.json", finite(result))
    shutil.rmtree(folder.checkpoints, ignore_errors=True)
    say(f"{cell.task.name} {cell.name}: {result['gains'][-1]:+.2f} std in {time.perf_counter() - start:.0f} s")


def run_examined(config: Config, folder: RunFolder, form: Form, out: Path) -> list[dict[str, Any]]:
    """The run, from its last checkpoint if it has one, -> one row per examination, the first before any update."""
    policy = make_policy(config)
    key = (config.model.name, form.steps, form.each, form.reference)
    if key not in _examiners:
        _examiners[key] = make_evaluator(policy, form, out / "reference")
    examiner, state = _examiners[key], make_training_state(policy, config)
    rows = resumable(folder, config)
    begin(folder, state, config, "latest" if folder.config_file.is_file() else None)
    if not rows:
        rows = [{"update": 0, **base_examination(examiner, policy)}]
        write_json(folder.path / JOURNAL, rows)
    for update in align(state, Job(config, config.prompts.read(), load_rewards(config))):
        folder.record(update)
        if update.number in exams(form):
            rows.append({"update": update.number, **examiner.measure(policy)})
            write_json(folder.path / JOURNAL, rows)
            folder.save(state, config)
    return rows


def lost_from_here(rows: list[dict[str, Any]], form: Form) -> list[dict[str, Any]]:
    """The examinations of a run whose gradient became infinite: from the last one on it has no right object."""
    return rows + [{**rows[-1], "update": u, "object": 0.0} for u in exams(form) if u > rows[-1]["update"]]


def resumable(folder: RunFolder, config: Config) -> list[dict[str, Any]]:
    """The examinations up to the last checkpoint; a folder that lost some is emptied, so that its run starts again."""
    if folder.config_file.is_file():
        require_same(folder.config(), config, folder.path)
    done = max(folder.numbers(), default=0)
    rows = [row for row in read_json(folder.path / JOURNAL, []) if row["update"] <= done]
    if done and (not rows or rows[-1]["update"] != done):
        clear(folder)
        return []
    return rows


def clear(folder: RunFolder) -> None:
    """Remove all but the lock, which the caller holds."""
    for entry in folder.path.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != ".lock":
            entry.unlink()


def base_examination(examiner: Evaluator, policy: Policy) -> dict[str, float]:
    """The model without its LoRA, measured once per examiner."""
    if examiner.before is None:
        with policy.reference():
            examiner.before = examiner.measure(policy)
    return examiner.before


def write_json(file: Path, value: Any) -> None:
    """Whole or not at all: a process that is killed leaves what was there."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    temporary.replace(file)


def read_json(file: Path, default: Any) -> Any:
    """What a file holds; the default where it is missing or was cut short."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return default


def summary(cell: Cell, folder: RunFolder, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A cell's result: its gains in standard deviations of the base model's pictures, its seconds, its commit."""
    name, records = cell.task.reward, folder.records()
    parts = ("seconds_rollout", "seconds_reward", "seconds_update")
    return {
        "cell": {"task": cell.task.name, "contender": cell.contender, "seed": cell.seed},
        "setting": [cell.learning_rate, cell.clip_range],
        "updates": [row["update"] for row in rows],
        "gains": [gain(row, rows[0], name) for row in rows],
        "rows": rows,
        "seconds_per_update": statistics.median(sum(record[p] for p in parts) for record in records),
        "commit": commit(),
    }
