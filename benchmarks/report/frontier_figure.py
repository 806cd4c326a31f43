"""Reward gained per model evaluation, the figure of the summary; and against diversity lost, task by task."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from matplotlib.patheffects import withStroke
from PIL import Image

from comfyui_pcpo.plotting import style
from comfyui_pcpo.plotting.panels import Line, LineStyle, Panel, draw_panels
from comfyui_pcpo.plotting.style import GRID, HEADING, INK, PALETTE, TEXT, TITLE, text_look

from ..study.methods import CREDIT_METHODS, STUDY_METHODS
from ..study.outcome import gains_within_limits, lost_diversity
from ..study.recipes import RECIPES
from ..study.statistics import t_interval
from .collect import CellRun, StudyResults, TaskResults

_CREDIT_COLORS = dict(zip(CREDIT_METHODS, (6, 0, 2, 1, 4), strict=True))
LOOKS: dict[str, tuple[int, LineStyle]] = {
    "ppo": (6, "line"),
    "ppo-early": (6, "dashed"),
    "ppo-branch-1": (2, "dashed"),
    "pcpo": (0, "line"),
    "pcpo-recommended": (3, "line"),
    "pcpo-branch-1": (2, "line"),
    "pcpo-branch-2": (5, "line"),
    "pcpo-branch-3": (5, "dashed"),
    "tempflow-grpo": (0, "dashed"),
    "grpo-guard": (3, "dashed"),
    "nft": (1, "line"),
    "nft-options": (1, "dashed"),
    "awm": (4, "line"),
    "awm-options": (4, "dashed"),
    **{name: (color, "line") for name, color in _CREDIT_COLORS.items()},
    **{f"{name}-branch-1": (color, "dashed") for name, color in _CREDIT_COLORS.items()},
}
X_LABEL, Y_LABEL = "diversity lost, %", "reward gain, base model's std"
PANEL, LEFT, TOP, ROW_TOP, BOTTOM, LABELS = (400, 300), 66, 76, 34, 52, 150  # pixels; LABELS beside each panel
LABEL_ROW = 16  # between two labels


def mean_path(runs: Sequence[CellRun]) -> tuple[list[float], list[float]]:
    """Diversity lost in per cent and reward gained, evaluation by evaluation, means over runs."""
    lost = np.array([lost_diversity(run.rows) for run in runs]).mean(0)
    return (100 * lost).tolist(), np.array([run.gains for run in runs]).mean(0).tolist()


def mean_progress(runs: Sequence[CellRun]) -> tuple[list[float], list[float]]:
    """Model evaluations in thousands and gain within the limits, evaluation by evaluation, means over runs."""
    spent = np.array([[row["model_evaluations"] for row in run.rows] for run in runs]).mean(0) / 1000
    return spent.tolist(), np.array([gains_within_limits(run.rows, run.task.reward) for run in runs]).mean(0).tolist()


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


class ProgressLine(NamedTuple):
    """A method and what its line is called."""

    method: str
    title: str


class ProgressPanel(NamedTuple):
    """A task and the methods that are drawn of it, as far as they have finished runs."""

    title: str
    task: TaskResults
    lines: Sequence[ProgressLine]


def progress_figure(panels: Sequence[ProgressPanel]) -> Image.Image:
    """Gain within the limits by model evaluations, two panels to a row."""
    columns = min(2, len(panels))
    width, height = LEFT + PANEL[0] + LABELS, ROW_TOP + PANEL[1] + BOTTOM
    total = TOP + height * -(-len(panels) // columns)
    figure = style.new_figure(width * columns, total)
    look = {"x": 0.01, "ha": "left", "va": "top"}
    figure.suptitle(
        "More reward for less work: up and to the left is better", y=1 - 9 / total, **look, **text_look(TITLE, INK)
    )
    note = (
        "Means over seeds, with their 95 % interval at the end of training.\n"
        "Gains count while images stay varied and near the base model's; then a line is flat."
    )
    figure.text(y=1 - 42 / total, s=note, **look, **text_look())
    for place, panel in enumerate(panels):
        row, column = divmod(place, columns)
        _draw_progress(style.add_axes(figure, column * width + LEFT, TOP + row * height + ROW_TOP, *PANEL), panel)
    return style.render(figure)


def _draw_progress(axes: Any, panel: ProgressPanel) -> None:
    axes.set_title(panel.title, loc="left", **text_look(HEADING, INK))
    axes.grid(axis="x", color=GRID)
    ends = []
    for line in panel.lines:
        if runs := panel.task.runs.get(line.method):
            x, y = mean_progress(runs)
            color = PALETTE[LOOKS[line.method][0]]
            axes.plot(x, y, color=color, linewidth=style.LINE, marker="o", markersize=style.SMALL_DOT)
            reach = t_interval([run.gain for run in runs])
            axes.vlines(x[-1], reach.low, reach.high, color=color, alpha=0.6, linewidth=style.THIN)
            ends.append(End(x[-1], y[-1], line.title, color))
    axes.set_xlabel("model evaluations, thousands", **text_look(TEXT))
    axes.set_ylabel(Y_LABEL, **text_look(TEXT))
    _label_ends(axes, ends)


@dataclass(frozen=True)
class End:
    """Where a line ends, and its name."""

    x: float
    y: float
    title: str
    color: str


def _label_ends(axes: Any, ends: list[End]) -> None:
    """Names at the ends of the lines, moved up where they would overlap."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    row, letter = LABEL_ROW / PANEL[1] * (high - low), style.CHARACTER * TEXT / PANEL[0] * (right - left)
    placed: list[tuple[float, float, float]] = []  # left and right end, height
    for end in sorted(ends, key=lambda end: end.y):
        stop = end.x + letter * (len(end.title) + 2)
        height = max([end.y, *(below + row for x, y, below in placed if x < stop and end.x < y)])
        placed.append((end.x, stop, height))
        halo = {"path_effects": [withStroke(linewidth=4, foreground="white")]}
        look = text_look(TEXT, end.color) | halo | {"va": "center"}
        axes.annotate(end.title, (end.x, height), (8, 0), textcoords="offset points", zorder=5, **look)


def task_figure(results: StudyResults) -> Image.Image:
    """A panel per task for the methods of the first wave, one for the later ones and the baseline: means over seeds."""
    study, panels = results.study, []
    for task in results.measured:
        for wave, addition in ((study.methods, ""), ((study.baseline, *study.later), ", further methods")):
            shown = [name for name in wave if name in task.measured]
            if set(shown) - {study.baseline}:
                title = f"{task.task.recipe}, {task.task.reward}{addition}"
                panels.append(Panel(title, X_LABEL, Y_LABEL, [_path(name, task.runs[name]) for name in shown]))
    return draw_panels(panels, columns=2)


def _path(name: str, runs: Sequence[CellRun]) -> Line:
    color, look = LOOKS[name]
    return Line(STUDY_METHODS[name].title, *mean_path(runs), style=look, color=color)
