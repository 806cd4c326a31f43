"""Differences from native PPO as dots with intervals: by task, and the summary over all tasks."""

import math
from collections.abc import Sequence
from typing import Any

from PIL import Image

from comfyui_pcpo.plotting import style
from comfyui_pcpo.plotting.style import INK, PALETTE

from ..study.methods import BASELINE, OURS, STUDY_METHODS
from ..study.statistics import Interval, t_interval
from .collect import TaskResults, by_seed
from .figures import LOOKS, UNITS

Effects = Sequence[tuple[str, Interval]]  # (method, difference)
ROW_HEIGHT = 24  # pixels


def _axes(figure: Any, position: tuple[int, int, int], title: str, share_x: Any = None) -> Any:
    """Axes with a line at 0 and no frame; rows run downward."""
    axes = figure.add_subplot(*position, sharex=share_x)
    axes.set_title(title, loc="left", fontsize=style.HEADING, color=INK)
    axes.axvline(0, color=INK, linewidth=1)
    axes.grid(axis="x", color=style.GRID)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=style.TEXT, colors=INK)
    for side in axes.spines.values():
        side.set_visible(False)
    return axes


def _draw_interval(axes: Any, y: float, name: str, interval: Interval) -> None:
    color = PALETTE[LOOKS[name][0]]
    if math.isfinite(interval.low) and math.isfinite(interval.high):
        axes.plot([interval.low, interval.high], [y, y], color=color, linewidth=style.LINE, marker="|", markersize=8)
    axes.plot([interval.value], [y], color=color, marker="o", markersize=6)


def _interval_figure(width: float, height: float) -> Any:
    figure = style.new_figure(width, height)
    figure.set_layout_engine("constrained")
    return figure


def effects_figure(groups: Sequence[tuple[str, Effects]]) -> Image.Image:
    """Effects over native PPO under the title of their task."""
    rows = sum(len(effects) + 1 for _, effects in groups)
    figure = _interval_figure(860, ROW_HEIGHT * rows + 90)
    axes = _axes(figure, (1, 1, 1), "Mean kept gain compared with native PPO")
    ticks, labels, y = [], [], 0
    for title, effects in groups:
        axes.text(0, y, title, transform=axes.get_yaxis_transform(), fontsize=style.TEXT, color=INK, va="center")
        for name, interval in effects:
            y += 1
            _draw_interval(axes, y, name, interval)
            ticks.append(y)
            labels.append(STUDY_METHODS[name].title)
        y += 1
    axes.set_yticks(ticks, labels)
    axes.set_ylim(y - 0.5, -0.7)
    axes.set_xlabel(f"difference, {UNITS}, 95 % intervals", fontsize=style.TEXT)
    return style.render(figure)


def everywhere(results: Sequence[TaskResults]) -> list[str]:
    """The methods that have runs in every task."""
    return [name for name in STUDY_METHODS if results and all(name in task.runs for task in results)]


def summary_figure(results: Sequence[TaskResults]) -> Image.Image:
    """Over all tasks: the gain at the end in any image, and the mean gain that keeps the objects."""
    names = [name for name in everywhere(results) if name != BASELINE]
    titles = [STUDY_METHODS[name].title + (" (this project)" if name == OURS else "") for name in names]
    figure = _interval_figure(900, 40 * len(names) + 150)
    figure.suptitle(
        f"Gain over native PPO, mean of {len(results)} tasks", x=0.01, ha="left", fontsize=style.TITLE, color=INK
    )
    panels = (
        ("Reward at the end,\nwhatever the images show", lambda run: run.gains[-1]),
        ("Mean reward over training,\nwhile the images keep their objects", lambda run: run.mean_kept_gain),
    )
    shared = None
    for column, (heading, of) in enumerate(panels):
        shared = axes = _axes(figure, (1, 2, 1 + column), heading, shared)
        for y, name in enumerate(names):
            _draw_interval(axes, y, name, t_interval(by_seed(results, name, BASELINE, of)))
        axes.set_yticks(range(len(names)), titles if column == 0 else [""] * len(names))
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel("standard deviations of the reward; 0 = native PPO", fontsize=style.TEXT)
    return style.render(figure)
