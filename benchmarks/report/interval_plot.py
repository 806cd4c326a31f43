"""Differences from native PPO as dots with intervals: by task, and the summary over all tasks."""

import io
import math
from collections.abc import Sequence
from typing import Any

from PIL import Image

from comfyui_pcpo.plotting.canvas import COLORS

from ..study.methods import BASELINE, OURS, STUDY_METHODS
from ..study.statistics import Interval, t_interval
from .collect import TaskResults, by_seed
from .figures import LOOKS, UNITS

Effects = Sequence[tuple[str, Interval]]  # (method, difference)
INK, FAINT = "#222831", "#d9dde2"
ROW_HEIGHT = 0.27  # inches


def _axes(figure: Any, position: tuple[int, int, int], title: str, share_x: Any = None) -> Any:
    """Axes with a line at 0 and no frame; rows run downward."""
    axes = figure.add_subplot(*position, sharex=share_x)
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.axvline(0, color=INK, linewidth=1)
    axes.grid(axis="x", color=FAINT)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, colors=INK)
    for side in axes.spines.values():
        side.set_visible(False)
    return axes


def _draw_interval(axes: Any, y: float, name: str, interval: Interval) -> None:
    color = COLORS[LOOKS[name][0]]
    if math.isfinite(interval.low) and math.isfinite(interval.high):
        axes.plot([interval.low, interval.high], [y, y], color=color, linewidth=2, marker="|", markersize=8)
    axes.plot([interval.value], [y], color=color, marker="o", markersize=6)


def _rendered(figure: Any) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, facecolor="white")
    return Image.open(buffer).convert("RGB")


def _new_figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def effects_figure(groups: Sequence[tuple[str, Effects]]) -> Image.Image:
    """Effects over native PPO under the title of their task."""
    rows = sum(len(effects) + 1 for _, effects in groups)
    figure = _new_figure(8.5, ROW_HEIGHT * rows + 1)
    axes = _axes(figure, (1, 1, 1), "Mean kept gain compared with native PPO")
    ticks, labels, y = [], [], 0
    for title, effects in groups:
        axes.text(0, y, title, transform=axes.get_yaxis_transform(), fontsize=9, color=INK, va="center")
        for name, interval in effects:
            y += 1
            _draw_interval(axes, y, name, interval)
            ticks.append(y)
            labels.append(STUDY_METHODS[name].title)
        y += 1
    axes.set_yticks(ticks, labels)
    axes.set_ylim(y - 0.5, -0.7)
    axes.set_xlabel(f"difference, {UNITS}, 95 % intervals", fontsize=9)
    return _rendered(figure)


def everywhere(results: Sequence[TaskResults]) -> list[str]:
    """The methods that have runs in every task."""
    return [name for name in STUDY_METHODS if results and all(name in task.runs for task in results)]


def summary_figure(results: Sequence[TaskResults]) -> Image.Image:
    """Over all tasks: the gain at the end in any image, and the mean gain that keeps the objects."""
    names = [name for name in everywhere(results) if name != BASELINE]
    titles = [STUDY_METHODS[name].title + (" (this project)" if name == OURS else "") for name in names]
    figure = _new_figure(9, 0.4 * len(names) + 1.8)
    figure.suptitle(f"Gain over native PPO, mean of {len(results)} tasks", x=0.01, ha="left", fontsize=12, color=INK)
    panels = (
        ("Reward at the end,\nwhatever the images show", lambda run: run.gains[-1]),
        ("Mean reward over training,\nwhile the images keep their objects", lambda run: run.mean_kept_gain),
    )
    shared = None
    for column, (title, of) in enumerate(panels):
        shared = axes = _axes(figure, (1, 2, 1 + column), title, shared)
        for y, name in enumerate(names):
            _draw_interval(axes, y, name, t_interval(by_seed(results, name, BASELINE, of)))
        axes.set_yticks(range(len(names)), titles if column == 0 else [""] * len(names))
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel("standard deviations of the reward; 0 = native PPO", fontsize=9)
    return _rendered(figure)
