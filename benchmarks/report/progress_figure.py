"""Panels of reward gained per model evaluation, a labelled line per method."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..study.outcome import gains_within_limits
from ..study.statistics import t_interval
from .collect import CellRun, TaskResults
from .labelled_figure import LabelledPanel, labelled_figure, method_line

TITLE = "More reward for less work: up and to the left is better"
NOTE = """Means over seeds, with their 95 % interval at the end of training.
Gains count while images stay varied and near the base model's; then a line is flat."""


def mean_progress(runs: Sequence[CellRun]) -> tuple[list[float], list[float]]:
    """Model evaluations in thousands and gain within the limits, evaluation by evaluation, means over runs."""
    spent = np.array([[row["model_evaluations"] for row in run.rows] for run in runs]).mean(0) / 1000
    return spent.tolist(), np.array([gains_within_limits(run.rows, run.task.reward) for run in runs]).mean(0).tolist()


class ProgressLine(NamedTuple):
    """A method and what its line is called, if not as the method is."""

    method: str
    title: str = ""


class ProgressPanel(NamedTuple):
    """A task and the methods that are drawn of it, as far as they have finished runs."""

    title: str
    task: TaskResults
    lines: Sequence[ProgressLine]


def progress_figure(panels: Sequence[ProgressPanel], title: str = TITLE) -> Image.Image:
    """Gain within the limits by model evaluations, two panels to a row."""
    return labelled_figure([_labelled(panel) for panel in panels], title, NOTE)


def _labelled(panel: ProgressPanel) -> LabelledPanel:
    lines = [
        method_line(method, *mean_progress(runs), title, t_interval([run.gain for run in runs]))
        for method, title in panel.lines
        if (runs := panel.task.runs.get(method))
    ]
    return LabelledPanel(panel.title, "model evaluations, thousands", lines)
