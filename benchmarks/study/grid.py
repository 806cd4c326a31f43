"""The grid of a study: its tasks, and the cells of each method in each of them."""

from dataclasses import dataclass
from pathlib import Path

from .methods import STUDY_METHODS
from .recipes import RECIPES
from .studies import Setting, Study


@dataclass(frozen=True)
class StudyTask:
    """A recipe and the reward that is trained on it."""

    recipe: str
    reward: str

    @property
    def name(self) -> str:
        return f"{self.recipe}/{self.reward}"

    @property
    def title(self) -> str:
        recipe = RECIPES[self.recipe]
        return f"{recipe.model}, {recipe.title}, reward {self.reward}"


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    task: StudyTask
    method: str
    setting: Setting
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}/{self.setting.name}-seed{self.seed}"

    def folder(self, out: Path) -> Path:
        return out / "cells" / self.task.recipe / self.task.reward / self.name


def study_tasks(study: Study) -> list[StudyTask]:
    return [StudyTask(recipe, reward) for recipe, reward in study.tasks]


def task_methods(study: Study, task: StudyTask) -> list[str]:
    """The methods that exist for the task's kind of model."""
    kind = RECIPES[task.recipe].kind
    return [name for name in study.every_method if STUDY_METHODS[name].model_kind in ("", kind)]


def task_sweep(study: Study, task: StudyTask) -> tuple[Setting, ...]:
    """The settings that every method of the task is tuned over."""
    return study.sweep[RECIPES[task.recipe].kind]


def reported_cells(study: Study, task: StudyTask, method: str, setting: Setting) -> list[Cell]:
    return [Cell(task, method, setting, seed) for seed in study.seeds]


def evaluation_updates(study: Study, updates: int) -> list[int]:
    """The updates after which a run of that many is evaluated, evenly spaced."""
    return sorted({-(-updates * part // study.evaluations) for part in range(1, study.evaluations + 1)})
