"""What a grid found so far: the finished reported cells of a task, contender by contender, seed by seed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from comfyui_pcpo.plotting.run_curves import column
from trainer.runs.folder import RunFolder

from ..study.grid import (
    Cell,
    Task,
    choose,
    common_settings,
    finished,
    fresh_cells,
    gain,
    keeping,
    kept_gains,
    kept_share,
    outcome,
    reported_cells,
    tasks,
)
from ..study.methods import BASELINE, Form, Setting
from ..study.statistics import at_reach, first_reach

GOALS = (0.25, 0.5, 0.75, 1.0)  # standard deviations of the base model's rewards above its mean, fixed before any run


@dataclass(frozen=True)
class Run:
    """One reported cell."""

    contender: str
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

    def examined(self, key: str) -> list[float]:
        return [row[key] for row in self.result["rows"]]

    @cached_property
    def kept(self) -> list[float]:
        """The gains, those of ruined pictures replaced by the last one before."""
        return kept_gains(self.result)

    @property
    def outcome(self) -> float:
        return outcome(self.result)

    @property
    def share(self) -> float:
        """Right objects at the end over those of the base model."""
        return kept_share(self.result["rows"][-1], self.result["rows"][0])

    def gain_in(self, reward: str) -> float:
        """Gain in any reward at the last examination that keeps the pictures."""
        rows = self.result["rows"]
        last = [row for row, keeps in zip(rows, keeping(rows), strict=True) if keeps][-1]
        return gain(last, rows[0], reward)

    @property
    def own(self) -> float:
        """Mean reward of its own rollouts, by its own sampler, over the last quarter of the updates."""
        rewards = over_updates(self, "reward_mean")
        return float(np.mean(rewards[-max(1, len(rewards) // 4) :]))

    def reach(self, goal: float) -> float:
        """Updates until the kept gain reaches `goal`, infinity where it never does."""
        return first_reach(self.updates, self.kept, goal)

    def matched(self, key: str, goal: float) -> float:
        """An examined number at the moment when the kept gain reaches `goal`."""
        return at_reach(self.updates, self.kept, goal, self.examined(key))

    def per_step(self, key: str) -> tuple[list[int], np.ndarray]:
        """Every step ever trained, and its metric in every update, (updates, steps); NaN where it was not trained."""
        tables = [record["per_step"] for record in self.records]
        steps = sorted({step for table in tables for step in table["steps"]})
        rows = np.full((len(tables), len(steps)), np.nan)
        for row, table in zip(rows, tables, strict=True):
            row[[steps.index(step) for step in table["steps"]]] = table[key]
        return steps, rows


Summary = Callable[[np.ndarray], np.ndarray]
"""(updates, steps) -> (steps,)"""


def mean_of_updates(table: np.ndarray) -> np.ndarray:
    """Mean of what there is, (N, steps) -> (steps,); NaN where there is nothing."""
    there = np.isfinite(table)
    count = there.sum(0)
    return np.where(count, np.where(there, table, 0).sum(0) / np.maximum(count, 1), np.nan)


def by_step(runs: Sequence[Run], key: str, of: Summary = mean_of_updates) -> tuple[list[int], np.ndarray]:
    """Every step that any run trained, and `of` its metric, mean over the runs that trained it, (steps,)."""
    found = [run.per_step(key) for run in runs]
    steps = sorted({step for own, _ in found for step in own})
    rows = np.full((len(runs), len(steps)), np.nan)
    for row, (own, table) in zip(rows, found, strict=True):
        row[[steps.index(step) for step in own]] = of(table)
    return steps, mean_of_updates(rows)


@dataclass(frozen=True)
class Found:
    """A task's runs, the contenders in their order."""

    task: Task
    chosen: dict[str, Setting]
    runs: dict[str, list[Run]]

    def rows(self) -> list[tuple[str, str, float]]:
        """(contender, block, outcome), a block being a seed of this task.

        Blocks of one seed share prompts and noise across tasks, so they are not independent draws of tasks.
        """
        every = [run for runs in self.runs.values() for run in runs]
        return [(run.contender, f"{self.task.name}/{run.seed}", run.outcome) for run in every]


def collect(form: Form, out: Path) -> list[Found]:
    """Every task at the settings that the tuning seeds chose."""
    chosen = {task: choose(form, task, out) or {} for task in tasks(form)}
    return _gather(form, out, {task: (one, reported_cells(form, task, one)) for task, one in chosen.items()})


def collect_common(form: Form, out: Path, fresh: bool = False) -> list[Found]:
    """Every task at the one setting for all, on the reported seeds or on the fresh ones."""
    common = {task: common_settings(form, task) for task in tasks(form)}
    cells = {
        task: (one, fresh_cells(form, task) if fresh else reported_cells(form, task, one))
        for task, one in common.items()
    }
    return _gather(form, out, cells)


def _gather(form: Form, out: Path, cells: dict[Task, tuple[dict[str, Setting], list[Cell]]]) -> list[Found]:
    """The finished ones, of every task of which the baseline and one other contender have a seed."""
    found = []
    for task, (chosen, wanted) in cells.items():
        runs: dict[str, list[Run]] = {name: [] for name in chosen}
        for cell, result in finished(wanted, form, out):
            runs[cell.contender].append(Run(cell.contender, cell.seed, result, cell.folder(out)))
        runs = {name: some for name, some in runs.items() if some}
        if BASELINE in runs and len(runs) > 1:
            found.append(Found(task, chosen, runs))
    return found


def both(found: Sequence[Found], first: str, second: str) -> list[tuple[Run, Run]]:
    """The two contenders' runs of every seed of every task that has both."""
    return [
        (mine, other)
        for task in found
        for mine in task.runs.get(first, ())
        for other in task.runs.get(second, ())
        if mine.seed == other.seed
    ]


def by_seed(
    found: Sequence[Found], first: str, second: str, of: Callable[[Run], float] = lambda run: run.outcome
) -> list[float]:
    """first - second in the outcome, averaged over the tasks that have both, one number for each seed."""
    gaps: dict[int, list[float]] = {}
    for mine, other in both(found, first, second):
        gaps.setdefault(mine.seed, []).append(of(mine) - of(other))
    return [sum(values) / len(values) for _, values in sorted(gaps.items())]


def over_updates(run: Run, key: str) -> list[float]:
    return column(run.records, key)
