"""The frontier's figures: reward gained per model evaluation, of the summary; against diversity lost, task by task."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from comfyui_pcpo.plotting.panels import Line, Panel, draw_panels

from ..study.methods import STUDY_METHODS
from ..study.outcome import lost_diversity
from ..study.recipes import RECIPES
from .collect import CellRun, StudyResults, TaskResults
from .looks import GAIN_LABEL, LOOKS
from .progress_figure import ProgressLine, ProgressPanel, progress_figure


def mean_path(runs: Sequence[CellRun]) -> tuple[list[float], list[float]]:
    """Diversity lost in per cent and reward gained, evaluation by evaluation, means over runs."""
    lost = np.array([lost_diversity(run.rows) for run in runs]).mean(0)
    return (100 * lost).tolist(), np.array([run.gains for run in runs]).mean(0).tolist()


def summary_figure(results: StudyResults) -> Image.Image:
    """One panel per task, with a labelled line for each method of the first wave: means over seeds."""
    panels = []
    for task in shown_tasks(results):
        lines = [ProgressLine(name, STUDY_METHODS[name].title) for name in results.study.methods]
        panels.append(ProgressPanel(f"{RECIPES[task.task.recipe].model}, reward {task.task.reward}", task, lines))
    return progress_figure(panels)


def shown_tasks(results: StudyResults) -> list[TaskResults]:
    """The tasks that all methods of the first wave have finished, else the first task with a finished run."""
    return [task for task in results.tasks if results.is_whole(task)] or results.measured[:1]


def task_figure(results: StudyResults) -> Image.Image:
    """A panel per task for the methods of the first wave, one for the later ones and the baseline: means over seeds."""
    study, panels = results.study, []
    for task in results.measured:
        for wave, addition in ((study.methods, ""), ((study.baseline, *study.later), ", further methods")):
            shown = [name for name in wave if name in task.measured]
            if set(shown) - {study.baseline}:
                title = f"{task.task.recipe}, {task.task.reward}{addition}"
                paths = [_path(name, task.runs[name]) for name in shown]
                panels.append(Panel(title, "diversity lost, %", GAIN_LABEL, paths))
    return draw_panels(panels, columns=2)


def _path(name: str, runs: Sequence[CellRun]) -> Line:
    color, look = LOOKS[name]
    return Line(STUDY_METHODS[name].title, *mean_path(runs), style=look, color=color)
