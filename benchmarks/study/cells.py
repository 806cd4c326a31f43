"""One cell of the grid: an ordinary training run with evaluations; it resumes, and its result is written at once."""

import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from comfyui_pcpo.tiny.align import PIXELS
from trainer.config.schema import Config, ConfigError
from trainer.loop.align import Job, Update, align
from trainer.loop.finite import Diverged
from trainer.loop.state import TrainingState, make_training_state
from trainer.policy.loading import make_policy
from trainer.runs.folder import RunFolder
from trainer.runs.launch import begin, guard_after
from trainer.runs.rewards import make_rewards
from trainer.runs.rows import finite

from .cell_config import cell_config, evaluation_identity, identity, require_same, require_same_evaluation
from .evaluator import shared_evaluator, study_evaluation
from .files import commit, read_json, source_checksum, write_json
from .grid import Cell, evaluation_updates
from .outcome import Row, gain_within_limits
from .studies import Study

Say = Callable[[str], None]
JOURNAL = "evaluations.json"
EVALUATION_FILE = "evaluation_settings.json"


@dataclass
class Spent:
    """What a run has spent on its updates, without evaluations."""

    model_evaluations: int = 0  # latents that the model predicted
    images: int = 0
    cpu_seconds: float = 0.0

    def metered(self, updates: Iterator[Update]) -> Iterator[Update]:
        """The updates, each added up as it is finished."""
        while True:
            start = time.process_time()
            update = next(updates, None)
            if update is None:
                return
            self.cpu_seconds += time.process_time() - start
            self.model_evaluations += sum(update.metrics["model_evaluations"].values())
            self.images += len(update.images)
            yield update


def run_cell(cell: Cell, study: Study, out: Path, say: Say) -> None:
    """Run what is left of a cell; the caller holds the lock of its folder."""
    start = time.perf_counter()
    config, tinyeval = cell_config(cell, study, out), study.reads_tinyeval(cell.seed)
    folder, title = run_folder(config), f"{cell.task.name} {cell.name}"
    rows = rows_to_the_end(config, study, out, lambda why: say(f"{title}: {why}"), tinyeval)
    result = cell_result(cell, config, evaluation_identity(study, tinyeval), rows)
    write_json(folder.path / "result.json", finite(result))
    shutil.rmtree(folder.checkpoints.path, ignore_errors=True)
    reached = gain_within_limits(rows, cell.task.reward)
    say(f"{title}: {reached:+.2f} std in {time.perf_counter() - start:.0f} s")


def run_folder(config: Config) -> RunFolder:
    return RunFolder(config.run.folder / config.run.name)


def rows_to_the_end(config: Config, study: Study, out: Path, say: Say, tinyeval: bool = False) -> list[Row]:
    """The evaluations of a run, also of one that diverges."""
    folder = run_folder(config)
    try:
        return run_evaluated(config, folder, study, out, tinyeval)
    except (FloatingPointError, Diverged) as error:
        rows = read_json(folder.path / JOURNAL, [])
        if not rows:
            name = config.model.name
            raise ConfigError(f"{name}, before any update: {error} Check the model's weights.") from error
        say(str(error))
        return diverged(rows, evaluation_updates(study, config.run.updates))


def run_evaluated(config: Config, folder: RunFolder, study: Study, out: Path, tinyeval: bool = False) -> list[Row]:
    """Run, or resume from the last checkpoint, -> one row per evaluation, the first before any update."""
    torch.set_num_threads(1)  # prices are seconds of one core
    policy = make_policy(config)
    evaluation = study_evaluation(study, config.prompts.lines)
    evaluator, state = shared_evaluator(policy, evaluation, out / "reference"), make_training_state(policy, config)
    made_with = evaluation_identity(study, tinyeval)
    rows = resumable(folder, config, made_with)
    begin(folder, state, config, "latest" if folder.config_file.is_file() else None)
    write_json(folder.path / EVALUATION_FILE, made_with)
    if not rows:
        rows = [{"update": 0, **asdict(Spent()), **evaluator.evaluate_base(policy, tinyeval)}]
        write_json(folder.path / JOURNAL, rows)
    spent = Spent(**{name: rows[-1][name] for name in asdict(Spent())})
    for update in spent.metered(align(state, cell_job(state, config, folder))):
        folder.record(update)
        if update.number in evaluation_updates(study, config.run.updates):
            with state.sampling("ema"):  # what the run delivers
                evaluated = evaluator.evaluate_policy(policy, tinyeval)
            rows.append({"update": update.number, **asdict(spent), **evaluated})
            write_json(folder.path / JOURNAL, rows)
            folder.save(state, config)
    return rows


def cell_job(state: TrainingState, config: Config, folder: RunFolder) -> Job:
    job = Job(config, config.prompts.read(), make_rewards(config))
    guard = guard_after(folder.records(), state.policy, job, folder) if config.guard.every else None
    return replace(job, guard=guard)


def diverged(rows: list[Row], updates: list[int]) -> list[Row]:
    """Evaluations of a run that diverged: after its last one everything is lost, and nothing more was spent."""
    later = [update for update in updates if update > rows[-1]["update"]]
    return rows + [{**lost(rows[-1]), "update": update} for update in later]


def lost(row: Row) -> Row:
    """An evaluation of a diverged model in place of `row`: no diversity, and NaN for all other measures."""
    kept = {key: row[key] for key in ("update", *asdict(Spent())) if key in row}
    measures = {key: value for key, value in row.items() if key not in kept}
    nan = {
        key: dict.fromkeys(value, math.nan) if isinstance(value, dict) else math.nan for key, value in measures.items()
    }
    return {**kept, **nan, "diversity": 0.0, "diverged": True}


def resumable(folder: RunFolder, config: Config, evaluation: dict[str, Any]) -> list[Row]:
    """Evaluations up to the last checkpoint; a folder that lost some is cleared, so that its run restarts."""
    if folder.config_file.is_file():
        require_same(folder.config(), config, folder.path)
        require_same_evaluation(read_json(folder.path / EVALUATION_FILE, None), evaluation, folder.path)
    done = max(folder.checkpoints.numbers(), default=0)
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


def cell_result(cell: Cell, config: Config, evaluation: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
    """Content of result.json."""
    return {
        "cell": {"task": cell.task.name, "method": cell.method, "seed": cell.seed},
        "setting": asdict(cell.setting),
        "rows": rows,
        "commit": commit(),
        "sources": source_checksum(),
        "pixels": PIXELS,
        "config": identity(config),
        "evaluation": evaluation,
    }
