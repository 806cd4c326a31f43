"""The frontier's figures: reward gained per model evaluation, and by task against diversity and distance."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from ..study.outcome import LIMITS, EvaluationRows, distance, lost_diversity
from ..study.recipes import RECIPES
from .collect import CellRun, StudyResults, TaskResults
from .labelled_figure import LabelledPanel, labelled_figure, method_line
from .progress_figure import ProgressLine, ProgressPanel, progress_figure

SUMMARISED = ("ppo", "ppo-branch-1", "pcpo", "pcpo-branch-1", "pcpo-recommended", "nft")
"""Methods that the summary's figure shows: what wins somewhere, and what it is compared with."""


def summary_figure(results: StudyResults) -> Image.Image:
    """One panel per task, with a labelled line for each of a few methods: means over seeds."""
    panels = []
    for task in shown_tasks(results):
        lines = [ProgressLine(name) for name in SUMMARISED]
        panels.append(ProgressPanel(f"{RECIPES[task.task.recipe].model}, reward {task.task.reward}", task, lines))
    return progress_figure(panels)


def shown_tasks(results: StudyResults) -> list[TaskResults]:
    """The tasks that all methods of the first wave have finished, else the first task with a finished run."""
    return [task for task in results.tasks if results.is_whole(task)] or results.measured[:1]


def lost_percent(rows: EvaluationRows) -> list[float]:
    return [100 * lost for lost in lost_diversity(rows)]


@dataclass(frozen=True)
class Cost:
    """What a gain is paid with, up to twice the limit's change: further out, images are spoilt."""

    name: str
    file: str  # name of the figure's file ends with it
    label: str  # of the axis
    of: Callable[[EvaluationRows], Sequence[float]]
    none: float  # before training
    limit: float

    @property
    def edge(self) -> float:
        return self.none + 2 * (self.limit - self.none)


LOST_DIVERSITY = Cost(
    "lost diversity", "diversity", "diversity lost, %", lost_percent, 0.0, 100 * LIMITS.lost_diversity
)
DISTANCE = Cost("distance", "distance", "distance from the base model; 1: as its own images", distance, 1.0, LIMITS.far)
COSTS = (LOST_DIVERSITY, DISTANCE)
COST_TITLE = "More reward for less {}: up and to the left is better"
COST_NOTE = """Means over seeds; a dot is the end of training, or where the path leaves the figure at twice the limit.
The dashed line is the limit within which gains count."""


def cost_figure(results: StudyResults, cost: Cost) -> Image.Image:
    """The panels of a cost as an image."""
    return labelled_figure(cost_panels(results, cost), COST_TITLE.format(cost.name), COST_NOTE)


def cost_panels(results: StudyResults, cost: Cost) -> list[LabelledPanel]:
    """A panel per task: the path of every method, evaluation by evaluation, means over seeds."""
    panels = []
    for task in results.measured:
        title = f"{RECIPES[task.task.recipe].model}, reward {task.task.reward}"
        paths = {name: up_to(cost.edge, *mean_path(task.runs[name], cost)) for name in task.measured}
        lines = [replace(method_line(name, *path), style="faint") for name, path in paths.items()]
        panels.append(LabelledPanel(title, cost.label, lines, cost.limit))
    return panels


def mean_path(runs: Sequence[CellRun], cost: Cost) -> tuple[list[float], list[float]]:
    """The cost and reward gained, evaluation by evaluation, means over runs, until one of these diverges."""
    path = np.array([(cost.of(run.rows), run.gains) for run in runs]).mean(0)
    spent, gained = path[:, np.isfinite(path).all(0)]
    return spent.tolist(), gained.tolist()


def up_to(edge: float, x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """The path until its x first passes `edge`, where it ends."""
    beyond = next((place for place, value in enumerate(x) if value > edge), None)
    if not beyond:
        return list(x), list(y)
    share = (edge - x[beyond - 1]) / (x[beyond] - x[beyond - 1])
    return [*x[:beyond], edge], [*y[:beyond], y[beyond - 1] + share * (y[beyond] - y[beyond - 1])]
