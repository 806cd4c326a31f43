"""Finished cells of a study, collected by task, method and seed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from comfyui_pcpo.plotting.run_curves import column
from trainer.runs.folder import RunFolder

from ..study.grid import Cell, StudyTask, common_settings, fresh_cells, reported_cells, study_tasks, task_methods
from ..study.kept_gain import gain, keeping, kept_gains, kept_share, mean_kept_gain
from ..study.methods import BASELINE
from ..study.statistics import at_reach, first_reach
from ..study.studies import Setting, Study
from ..study.tuning import choose, finished

GOALS = (0.25, 0.5, 0.75, 1.0)  # gains, in standard deviations of the base model's rewards; fixed before any run


@dataclass(frozen=True)
class CellRun:
    """A finished cell: its result and the metrics of its run."""

    method: str
    seed: int
    result: dict[str, Any]
    folder: Path

    @property
    def updates(self) -> list[float]:
        return self.result["updates"]

    @property
    def gains(self) -> list[float]:
        return self.result["gains"]

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        return RunFolder(self.folder).records()

    @cached_property
    def model_evaluations(self) -> int:
        """Latents that the model predicted in rollouts and gradient steps; 0 in records that do not count them."""
        counts = [record.get("model_evaluations", {}) for record in self.records]
        return sum(count.get("rollout", 0) + count.get("update", 0) for count in counts)

    def over_updates(self, key: str) -> list[float]:
        """A metric of the run, by update."""
        return column(self.records, key)

    def evaluated(self, key: str) -> list[float]:
        """A number by evaluation."""
        return [row[key] for row in self.result["rows"]]

    @cached_property
    def kept(self) -> list[float]:
        """Kept gain by evaluation."""
        return kept_gains(self.result)

    @property
    def mean_kept_gain(self) -> float:
        return mean_kept_gain(self.result)

    @property
    def share(self) -> float:
        """Correct objects at the end relative to the base model."""
        return kept_share(self.result["rows"][-1], self.result["rows"][0])

    def gain_in(self, reward: str) -> float:
        """Gain in any reward at the last evaluation that kept its objects."""
        rows = self.result["rows"]
        last = [row for row, keeps in zip(rows, keeping(rows), strict=True) if keeps][-1]
        return gain(last, rows[0], reward)

    @property
    def rollout_reward(self) -> float:
        """Mean reward of the run's own rollouts, by its own sampler, over the last quarter of the updates."""
        rewards = self.over_updates("reward_mean")
        return float(np.mean(rewards[-max(1, len(rewards) // 4) :]))

    def reach(self, goal: float) -> float:
        """Updates until the kept gain reaches `goal`; infinity if it never does."""
        return first_reach(self.updates, self.kept, goal)

    def matched(self, key: str, goal: float) -> float:
        """An evaluated number where the kept gain reaches `goal`."""
        return at_reach(self.updates, self.kept, goal, self.evaluated(key))

    def per_step(self, key: str) -> tuple[list[int], np.ndarray]:
        """Every step that was trained, and its metric, (updates, steps); NaN in updates that did not train it."""
        tables = [record["per_step"] for record in self.records]
        steps = sorted({step for table in tables for step in table["steps"]})
        rows = np.full((len(tables), len(steps)), np.nan)
        for row, table in zip(rows, tables, strict=True):
            row[[steps.index(step) for step in table["steps"]]] = table[key]
        return steps, rows


StepSummary = Callable[[np.ndarray], np.ndarray]
"""(updates, steps) -> (steps,)"""


def mean_where_finite(table: np.ndarray) -> np.ndarray:
    """Mean of the finite values, (N, steps) -> (steps,); NaN where there are none."""
    is_finite = np.isfinite(table)
    count = is_finite.sum(0)
    return np.where(count, np.where(is_finite, table, 0).sum(0) / np.maximum(count, 1), np.nan)


def by_step(runs: Sequence[CellRun], key: str, of: StepSummary = mean_where_finite) -> tuple[list[int], np.ndarray]:
    """Every step that any run trained, and `of` its metric, averaged over the runs that trained it, (steps,)."""
    tables = [run.per_step(key) for run in runs]
    steps = sorted({step for own, _ in tables for step in own})
    rows = np.full((len(runs), len(steps)), np.nan)
    for row, (own, table) in zip(rows, tables, strict=True):
        row[[steps.index(step) for step in own]] = of(table)
    return steps, mean_where_finite(rows)


@dataclass(frozen=True)
class TaskResults:
    """Finished runs of a task by method."""

    task: StudyTask
    chosen: dict[str, Setting]
    runs: dict[str, list[CellRun]]

    def rows(self) -> list[tuple[str, str, float]]:
        """(method, block, mean kept gain); a block is a seed of this task.

        Blocks of one seed share prompts and noise across tasks, so they are not independent draws of tasks.
        """
        all_runs = [run for runs in self.runs.values() for run in runs]
        return [(run.method, f"{self.task.name}/{run.seed}", run.mean_kept_gain) for run in all_runs]


def collect(study: Study, out: Path) -> list[TaskResults]:
    """Every task at the settings that the tuning seeds chose."""
    chosen = {task: choose(study, task, out) or {} for task in study_tasks(study)}
    cells = {task: (settings, reported_cells(study, task, settings)) for task, settings in chosen.items()}
    return _gather(study, out, cells)


def collect_common(study: Study, out: Path, fresh: bool = False) -> list[TaskResults]:
    """Every task at the common setting, on the reported seeds or on the fresh ones."""
    common = {task: common_settings(study, task) for task in study_tasks(study)}
    cells = {
        task: (settings, fresh_cells(study, task) if fresh else reported_cells(study, task, settings))
        for task, settings in common.items()
    }
    return _gather(study, out, cells)


def complete(results: Sequence[TaskResults], study: Study) -> list[TaskResults]:
    """The tasks in which every method has finished every seed."""
    return [
        task
        for task in results
        if list(task.runs) == task_methods(study, task.task)
        and all(len(runs) == len(study.seeds) for runs in task.runs.values())
    ]


def _gather(
    study: Study, out: Path, cells: dict[StudyTask, tuple[dict[str, Setting], list[Cell]]]
) -> list[TaskResults]:
    """Results of the tasks in which the baseline and at least one other method have a finished seed."""
    results = []
    for task, (chosen, task_cells) in cells.items():
        runs: dict[str, list[CellRun]] = {name: [] for name in chosen}
        for cell, result in finished(task_cells, study, out):
            runs[cell.method].append(CellRun(cell.method, cell.seed, result, cell.folder(out)))
        runs = {name: own for name, own in runs.items() if own}
        if BASELINE in runs and len(runs) > 1:
            results.append(TaskResults(task, chosen, runs))
    return results


def paired_runs(results: Sequence[TaskResults], first: str, second: str) -> list[tuple[CellRun, CellRun]]:
    """Runs of two methods paired by seed, in every task that has both."""
    return [
        (mine, other)
        for task in results
        for mine in task.runs.get(first, ())
        for other in task.runs.get(second, ())
        if mine.seed == other.seed
    ]


def by_seed(
    results: Sequence[TaskResults],
    first: str,
    second: str,
    of: Callable[[CellRun], float] = lambda run: run.mean_kept_gain,
) -> list[float]:
    """Difference first - second in the mean kept gain, averaged over the tasks that have both, one number per seed."""
    differences: dict[int, list[float]] = {}
    for mine, other in paired_runs(results, first, second):
        differences.setdefault(mine.seed, []).append(of(mine) - of(other))
    return [sum(values) / len(values) for _, values in sorted(differences.items())]
