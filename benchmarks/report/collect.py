"""Finished cells of a study, collected by task, method and seed."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from trainer.runs.folder import RunFolder

from ..study import outcome
from ..study.grid import StudyTask, reported_cells, study_tasks, task_methods
from ..study.outcome import Limits, Price, Row
from ..study.studies import Setting, Study
from ..study.tuning import Tuning, finished, tune


@dataclass(frozen=True)
class CellRun:
    """A finished reported cell: its result and the metrics of its run."""

    task: StudyTask
    method: str
    seed: int
    result: dict[str, Any]
    folder: Path

    @property
    def rows(self) -> list[Row]:
        return self.result["rows"]

    @cached_property
    def gains(self) -> list[float]:
        return outcome.gains(self.rows, self.task.reward)

    @property
    def gain(self) -> float:
        """Gain within limits, the number that methods are compared in."""
        return outcome.gain_within_limits(self.rows, self.task.reward)

    def gain_within(self, limits: Limits) -> float:
        return outcome.gain_within_limits(self.rows, self.task.reward, limits)

    def gain_at(self, spent: float, of: Price = "model_evaluations") -> float:
        return outcome.gain_at_price(self.rows, self.task.reward, spent, of)

    def price(self, goal: float, of: Price = "model_evaluations") -> float:
        return outcome.price(self.rows, self.task.reward, goal, of)

    @property
    def without_signal(self) -> float:
        """Share of updates in which every image has an advantage of 0; NaN of a run without records."""
        records = RunFolder(self.folder).records()
        return sum(record["advantage_abs_max"] == 0 for record in records) / len(records) if records else math.nan

    def per_step(self, key: str) -> tuple[list[int], np.ndarray]:
        """Every step that was trained, and its metric, (updates, steps); NaN in updates that did not train it."""
        tables = [record["per_step"] for record in RunFolder(self.folder).records()]
        steps = sorted({step for table in tables for step in table["steps"]})
        rows = np.full((len(tables), len(steps)), np.nan)
        for row, table in zip(rows, tables, strict=True):
            row[[steps.index(step) for step in table["steps"]]] = table[key]
        return steps, rows


RunMeasure = Callable[[CellRun], float]


def run_gain(run: CellRun) -> float:
    return run.gain


def mean_where_finite(table: np.ndarray) -> np.ndarray:
    """Mean of the finite values, (N, steps) -> (steps,); NaN where there are none."""
    is_finite = np.isfinite(table)
    count = is_finite.sum(0)
    return np.where(count, np.where(is_finite, table, 0).sum(0) / np.maximum(count, 1), np.nan)


def by_step(runs: Sequence[CellRun], key: str) -> tuple[list[int], np.ndarray]:
    """Every step that any run trained, and its metric, averaged over the runs that trained it, (steps,)."""
    tables = [run.per_step(key) for run in runs]
    steps = sorted({step for own, _ in tables for step in own})
    rows = np.full((len(runs), len(steps)), np.nan)
    for row, (own, table) in zip(rows, tables, strict=True):
        row[[steps.index(step) for step in own]] = mean_where_finite(table)
    return steps, mean_where_finite(rows)


@dataclass(frozen=True)
class TaskResults:
    """A task's tuning and its finished reported runs by method; a method without any has an empty list."""

    task: StudyTask
    tuning: dict[str, Tuning]
    runs: dict[str, list[CellRun]]

    @property
    def chosen(self) -> dict[str, Setting]:
        """The settings of the methods whose tuning is finished."""
        return {name: tuning.chosen for name, tuning in self.tuning.items() if tuning.chosen is not None}

    @property
    def measured(self) -> list[str]:
        """The methods that have a finished run."""
        return [name for name, runs in self.runs.items() if runs]


@dataclass(frozen=True)
class StudyResults:
    """A study, as far as it is finished."""

    name: str
    study: Study
    out: Path
    tasks: list[TaskResults]

    @property
    def measured(self) -> list[TaskResults]:
        """The tasks that have a finished run."""
        return [task for task in self.tasks if task.measured]

    @property
    def methods(self) -> list[str]:
        """The methods that have a finished run in any task, in the study's order."""
        return [name for name in self.study.every_method if any(task.runs.get(name) for task in self.tasks)]

    @property
    def general(self) -> list[str]:
        """Those that exist in every task, and are finished wherever the first wave is: their means can be compared."""
        whole = [task for task in self.tasks if self.is_whole(task)]
        general = [name for name in self.methods if all(name in task.runs for task in self.tasks)]
        return [name for name in general if all(self.has_every_seed(task, name) for task in whole)]

    def finished(self, *methods: str) -> list[TaskResults]:
        """The tasks in which each of the methods has finished every seed."""
        return [task for task in self.tasks if all(self.has_every_seed(task, name) for name in methods)]

    def has_every_seed(self, task: TaskResults, method: str) -> bool:
        return len(task.runs.get(method, ())) == len(self.study.seeds)

    def is_whole(self, task: TaskResults) -> bool:
        """Whether the whole first wave has finished the task, apart from methods that do not exist in it."""
        return all(self.has_every_seed(task, name) for name in self.study.methods if name in task.runs)

    def comparable(self, *methods: str) -> list[TaskResults]:
        """The tasks that the methods and the whole first wave have finished; without any, those that they have."""
        own = self.finished(*methods)
        return [task for task in own if self.is_whole(task)] or own


def collect(name: str, study: Study, out: Path) -> StudyResults:
    """What is finished of a study in its folder `out`."""
    return StudyResults(name, study, out, [collect_task(study, task, out) for task in study_tasks(study)])


def collect_task(study: Study, task: StudyTask, out: Path) -> TaskResults:
    tuning = {name: tune(study, task, name, out) for name in task_methods(study, task)}
    runs: dict[str, list[CellRun]] = {name: [] for name in tuning}
    for name, own in tuning.items():
        if own.chosen is not None:
            cells = reported_cells(study, task, name, own.chosen)
            for cell, result in finished(cells, study, out):
                runs[name].append(CellRun(task, name, cell.seed, result, cell.folder(out)))
    return TaskResults(task, tuning, runs)
