"""The grid of a study: its tasks, and the cells that are tuned and reported."""

from dataclasses import dataclass
from pathlib import Path

from .methods import BASELINE, OURS, STUDY_METHODS
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
    learning_rate: float
    clip_range: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}/lr{self.learning_rate:g}-clip{self.clip_range:g}-seed{self.seed}"

    def folder(self, out: Path) -> Path:
        return out / "cells" / self.task.recipe / self.task.reward / self.name


def study_tasks(study: Study) -> list[StudyTask]:
    return [StudyTask(recipe, reward) for recipe, reward in study.tasks]


def task_methods(study: Study, task: StudyTask) -> list[str]:
    """The methods that exist for the task's kind of model, without those that the study skips."""
    kind = RECIPES[task.recipe].kind
    known = [name for name in study.methods if STUDY_METHODS[name].model_kind in ("", kind)]
    return [name for name in known if (task.recipe, name) not in study.skips]


def method_settings(study: Study, task: StudyTask, method: str) -> list[Setting]:
    """The sweep, the same for all methods; without clipping, one setting per learning rate."""
    sweep = study.sweep[RECIPES[task.recipe].kind]
    if STUDY_METHODS[method].clips:
        return list(sweep)
    first: dict[float, float] = {}
    for rate, clip in sweep:
        first.setdefault(rate, clip)
    return list(first.items())


def tuning_task(study: Study, task: StudyTask) -> StudyTask:
    """The task whose tuning seeds choose this one's settings: itself, or that of a recipe with the same sampler."""
    return StudyTask(study.tuned_as.get(task.recipe, task.recipe), task.reward)


def tuning_cells(study: Study, task: StudyTask) -> list[Cell]:
    """The runs that choose a task's settings."""
    task = tuning_task(study, task)
    return [
        Cell(task, method, *setting, seed)
        for method in task_methods(study, task)
        for setting in method_settings(study, task, method)
        for seed in study.tuning_seeds
    ]


def common_settings(study: Study, task: StudyTask) -> dict[str, Setting]:
    """The one setting at which all methods are also compared; empty if the study has none for the recipe."""
    common = study.common.get(task.recipe)
    if common is None:
        return {}
    by_method = {}
    for name in task_methods(study, task):
        same_rate = [setting for setting in method_settings(study, task, name) if setting[0] == common[0]]
        by_method[name] = common if common in same_rate else same_rate[0]
    return by_method


def reported_cells(study: Study, task: StudyTask, chosen: dict[str, Setting]) -> list[Cell]:
    """Cells ordered by seed, so that an interrupted grid has complete blocks of methods."""
    return [Cell(task, name, *setting, seed) for seed in study.seeds for name, setting in chosen.items()]


def fresh_cells(study: Study, task: StudyTask) -> list[Cell]:
    """PCPO and its baseline at the common setting, on seeds that took no part in any decision."""
    common = common_settings(study, task)
    pair = [(name, common[name]) for name in (BASELINE, OURS) if name in common]
    return [Cell(task, name, *setting, seed) for seed in study.fresh_seeds for name, setting in pair]


def evaluation_updates(study: Study) -> list[int]:
    """The updates after which a run is evaluated."""
    return [u for u in range(1, study.updates + 1) if u % study.evaluate_every == 0 or u == study.updates]
