"""Panels of reward gained per model evaluation, a labelled line per method."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from matplotlib.patheffects import withStroke
from PIL import Image

from comfyui_pcpo.plotting import style
from comfyui_pcpo.plotting.style import GRID, HEADING, INK, PALETTE, TEXT, TITLE, text_look

from ..study.outcome import gains_within_limits
from ..study.statistics import t_interval
from .collect import CellRun, TaskResults
from .looks import GAIN_LABEL, LOOKS

PANEL, LEFT, TOP, ROW_TOP, BOTTOM, LABELS = (400, 300), 66, 76, 34, 52, 150  # pixels; LABELS beside each panel
LABEL_ROW = 16  # between two labels


def mean_progress(runs: Sequence[CellRun]) -> tuple[list[float], list[float]]:
    """Model evaluations in thousands and gain within the limits, evaluation by evaluation, means over runs."""
    spent = np.array([[row["model_evaluations"] for row in run.rows] for run in runs]).mean(0) / 1000
    return spent.tolist(), np.array([gains_within_limits(run.rows, run.task.reward) for run in runs]).mean(0).tolist()


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
    axes.set_ylabel(GAIN_LABEL, **text_look(TEXT))
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
