"""One cell of the grid: an ordinary run of the trainer, examined on the way; resumable, its result written at once."""

import json
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.align import align, make_learner
from trainer.config import Config
from trainer.run import RunFolder, finite
from trainer.train import load_rewards, make_policy

from .contenders import Form
from .grid import Cell, cell_config
from .measure import Examiner, make_examiner

ROOT = Path(__file__).resolve().parent.parent
Say = Callable[[str], None]
_examiners: dict[tuple[str, Form], Examiner] = {}


def commit(root: Path = ROOT) -> str:
    """The commit that is checked out, or what the file COMMIT says, or unknown."""
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
    rows = run_examined(cell_config(cell, form, out), folder, form, out)
    result = summary(cell, folder, rows)
    temporary = folder.path / "result.tmp"
    temporary.write_text(json.dumps(finite(result)), encoding="utf-8")
    temporary.replace(folder.path / "result.json")
    shutil.rmtree(folder.checkpoints, ignore_errors=True)
    say(f"{cell.task.name} {cell.name}: {result['gains'][-1]:+.2f} std in {time.perf_counter() - start:.0f} s")


def run_examined(config: Config, folder: RunFolder, form: Form, out: Path) -> list[dict[str, Any]]:
    """The run, from its last checkpoint if it has one, -> one row per examination, the first before any update."""
    policy = make_policy(config)
    key = (config.model.name, form)
    if key not in _examiners:
        _examiners[key] = make_examiner(policy, form, out / "reference")
    examiner, learner = _examiners[key], make_learner(policy, config)
    if folder.numbers():
        folder.load(learner)
    elif not folder.config_file.is_file():
        folder.start(config)
    folder.keep_records(learner.done)
    journal = folder.path / "examinations.json"
    rows = [r for r in read_json(journal, []) if r["update"] <= learner.done]
    if not rows:
        examiner.before = examiner.before or examiner.measure(policy)  # a fresh LoRA adds nothing
        rows.append({"update": 0, **examiner.before})
    for update in align(learner, load_rewards(config), config.prompts.read(), config):
        folder.record(update)
        if update.number % form.every == 0 or update.number == config.run.updates:
            rows.append({"update": update.number, **examiner.measure(policy)})
            journal.write_text(json.dumps(rows), encoding="utf-8")
            folder.save(learner, config)
    return rows


def read_json(file: Path, default: Any) -> Any:
    """What a file holds; the default where it is missing or was cut short."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return default


def summary(cell: Cell, folder: RunFolder, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A cell's result: its gains in standard deviations of the base model's pictures, its seconds, its commit."""
    name, records = cell.task.reward, folder.records()
    base, spread = rows[0][name], rows[0][f"{name}_std"]
    parts = ("seconds_rollout", "seconds_reward", "seconds_update")
    return {
        "cell": {"task": cell.task.name, "contender": cell.contender, "seed": cell.seed},
        "setting": [cell.learning_rate, cell.clip_range],
        "updates": [row["update"] for row in rows],
        "gains": [(row[name] - base) / spread for row in rows],
        "rows": rows,
        "seconds_per_update": statistics.median(sum(record[p] for p in parts) for record in records),
        "commit": commit(),
    }
