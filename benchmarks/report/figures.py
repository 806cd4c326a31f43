"""The benchmark's figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from comfyui_pcpo.plotting import style
from comfyui_pcpo.plotting.panels import STEP_AXIS, Line, LineStyle, Panel, draw_panels
from comfyui_pcpo.plotting.run_curves import smooth
from comfyui_pcpo.plotting.style import COLORS, TEXT

from ..study.methods import BASELINE, CONTENDERS, OURS
from ..study.statistics import Interval, t_limits
from .collect import Found, Run, Summary, by_step, mean_of_updates, over_updates

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# one colour per objective and credit; PCPO's variants share its blue
LOOKS: dict[str, tuple[int, LineStyle]] = {
    "ppo": (6, "line"),
    "log-hinge": (1, "dashed"),  # it often lies on native PPO's line
    "pcpo": (0, "line"),
    "pcpo-paper": (0, "dashed"),
    "pcpo-uniform": (0, "points"),
    "tempflow": (2, "line"),
    "guard-dt": (2, "dashed"),
    "awm": (3, "line"),
    "nft": (4, "line"),
    "window": (6, "dashed"),
    "pcpo-window": (5, "dashed"),
    "cps": (6, "points"),
    "pcpo-cps": (5, "points"),
}
SIZE = (520, 380)
FOREST_WIDTH, FOREST_LEFT, FOREST_ROW = 760, 230, 24

Group = tuple[str, Sequence[tuple[str, Interval]]]
"""A title, and effects by method."""


def line(name: str, x: Sequence[float], y: Sequence[float]) -> Line:
    color, line_style = LOOKS[name]
    return Line(CONTENDERS[name].title, x, y, style=line_style, color=color)


def band(name: str, x: Sequence[float], limits: Sequence[Interval]) -> Line:
    """The contender's curve with its intervals."""
    color, line_style = LOOKS[name]
    low, high = [i.low for i in limits], [i.high for i in limits]
    return Line(CONTENDERS[name].title, x, [i.value for i in limits], low, high, line_style, color)


def _mean(runs: Sequence[Run], of: Callable[[Run], Sequence[float]]) -> list[float]:
    return np.array([of(run) for run in runs], float).mean(0).tolist()


def _each(found: Found, of: Callable[[Run], Sequence[float]], x: Callable[[Run], Sequence[float]]) -> list[Line]:
    """One line per contender: the mean over seeds."""
    return [line(name, x(runs[0]), _mean(runs, of)) for name, runs in found.runs.items()]


def convergence(found: Found) -> Image.Image:
    """Gain by update, that of it which keeps the pictures, and its paired difference from native PPO."""
    gains, kept, differences = [], [], []
    baseline = {run.seed: run.kept for run in found.runs[BASELINE]}
    for name, runs in found.runs.items():
        x, shown = runs[0].updates, name in (BASELINE, OURS)
        gains.append(line(name, x, _mean(runs, lambda r: r.gains)))
        limits = [t_limits(c) for c in np.array([run.kept for run in runs]).T]
        kept.append(band(name, x, limits) if shown else line(name, x, [i.value for i in limits]))
        paired = [np.subtract(run.kept, baseline[run.seed]) for run in runs if run.seed in baseline]
        if name != BASELINE and paired:
            limits = [t_limits(c) for c in np.array(paired).T]
            differences.append(band(name, x, limits) if shown else line(name, x, [i.value for i in limits]))
    counts = sorted({len(runs) for runs in found.runs.values()})
    seeds = f"{'-'.join(map(str, (counts[0], counts[-1])[: len(counts)]))} seeds"
    units = "std of the base model's rewards"
    return draw_panels(
        [
            Panel("Gain, ruined pictures too", "update", units, gains, note=f"{seeds}, means"),
            Panel("Kept gain", "update", units, kept, note="95 % bands"),
            Panel("Kept gain over native PPO", "update", units, differences, hlines=(0.0,), note="paired by seed"),
        ],
        columns=3,
        size=SIZE,
    )


def _unsteadiness(table: np.ndarray) -> np.ndarray:
    """Standard deviation over mean of each step's gradient norm, over the last three quarters of the updates."""
    late = table[len(table) // 4 :]
    mean = mean_of_updates(late)
    spread = np.sqrt(mean_of_updates((late - mean) ** 2)) / mean
    return np.where(np.isfinite(late).sum(0) > 1, spread, np.nan)  # one update has no spread


def health(found: Found) -> Image.Image:
    """Clip fraction, gradient norm and Taylor error: over training and per step."""

    def updates(run: Run) -> list[float]:
        return over_updates(run, "update")

    def steps(key: str, of: Summary = mean_of_updates) -> list[Line]:
        found_of = {name: by_step(runs, key, of) for name, runs in found.runs.items()}
        return [line(name, [float(i) for i in x], y.tolist()) for name, (x, y) in found_of.items()]

    def curve(key: str) -> Callable[[Run], Sequence[float]]:
        return lambda run: smooth(over_updates(run, key), 0.6)

    unsteadiness = steps("grad_norm", _unsteadiness)
    panels = [
        Panel("Clip fraction", "update", "share of clipped terms", _each(found, curve("clip_fraction"), updates)),
        Panel("Clip fraction per step", STEP_AXIS, "share of clipped terms", steps("clip_fraction")),
        Panel("Taylor error per step", STEP_AXIS, "|log rho - (rho - 1)|", steps("taylor_error"), log_y=True),
        Panel("Gradient norm", "update", "norm", _each(found, curve("grad_norm"), updates), log_y=True),
        Panel("Gradient norm per step", STEP_AXIS, "norm of the step's share", steps("grad_norm"), log_y=True),
        Panel("Unsteadiness of the gradient norm", STEP_AXIS, "std / mean over updates", unsteadiness),
    ]
    return draw_panels(panels, columns=3, size=SIZE)


def matched(found: Found) -> Image.Image:
    """What a gain costs: distances, diversity and prompt following against the gain, mean over seeds."""
    kinds = (
        ("fd_base", "Distance to the base model", "tiny FD"),
        ("fd_drawn", "Distance to drawn pictures", "tiny FD"),
        ("diversity", "Diversity", "1 - cosine within a prompt"),
        ("object", "Right object", "share of pictures"),
    )
    panels = []
    for key, title, label in kinds:
        lines = [
            line(name, _mean(runs, lambda r: r.gains), _mean(runs, lambda r, key=key: r.examined(key)))
            for name, runs in found.runs.items()
        ]
        panels.append(Panel(title, "gain, std of the base model's rewards", label, lines))
    return draw_panels(panels, columns=2, size=(560, 380))


def forest(groups: Sequence[Group], title: str, x_label: str) -> Image.Image:
    """Effects with their limits, one row each, under the title of their group; 0 is a line."""
    from matplotlib.ticker import MaxNLocator

    rows = sum(len(effects) + 1 for _, effects in groups)
    figure = style.new_figure(FOREST_WIDTH, 44 + rows * FOREST_ROW + 52)
    axes = style.add_axes(figure, FOREST_LEFT, 44, FOREST_WIDTH - FOREST_LEFT - 24, rows * FOREST_ROW)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=style.GRID, linewidth=style.THIN, linestyle="-")
    axes.spines["bottom"].set_visible(False)
    axes.axvline(0, color=style.MUTED, linewidth=style.THIN)
    axes.set(ylim=(rows, 0), yticks=())
    axes.set_xlabel(x_label, **style.text_look())
    figure.suptitle(title, x=24 / FOREST_WIDTH, ha="left", **style.text_look(style.TITLE, style.INK))
    paper = {"facecolor": style.PAPER, "edgecolor": "none", "pad": 2}
    y = 0.5
    for name, effects in groups:
        _write_beside(axes, name, y, 24 - FOREST_LEFT, {**style.text_look(style.HEADING, style.INK), "bbox": paper})
        for method, interval in effects:
            y += 1
            _write_beside(axes, CONTENDERS[method].title, y, -8, {"ha": "right", **style.text_look(TEXT, style.INK)})
            _draw_effect(axes, interval, y, COLORS[LOOKS[method][0]])
        y += 1
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=style.ROUND))
    return style.render(figure)


def _write_beside(axes: Axes, text: str, y: float, pixels: float, look: dict[str, Any]) -> None:
    """Text at a height of the data, so many pixels to the right of the axes' left edge."""
    axes.annotate(text, (0, y), (pixels, 0), axes.get_yaxis_transform(), "offset points", va="center", **look)


def _draw_effect(axes: Axes, interval: Interval, y: float, color: str) -> None:
    """A dot with its limits where they are known."""
    limits = np.array([[interval.value - interval.low], [interval.high - interval.value]])
    error = limits if np.isfinite(limits).all() else None
    look = {"color": color, "markersize": 9, "linewidth": style.LINE, "capsize": 4, "capthick": style.LINE}
    axes.errorbar([interval.value], [y], xerr=error, fmt="o", **look)
