"""The benchmark's pictures."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from comfyui_pcpo.plotting.axis import Axis, ticks
from comfyui_pcpo.plotting.axis import tick_text as written
from comfyui_pcpo.plotting.canvas import COLORS, GRID, INK, MUTED, PAPER, Canvas, text_width
from comfyui_pcpo.plotting.figure import Line, Panel, Style, figure
from comfyui_pcpo.plotting.plot import smooth

from ..study.methods import BASELINE, CONTENDERS, OURS
from ..study.statistics import Interval, t_limits
from .collect import Found, Run, Summary, by_step, mean_of_updates, over_updates

# one colour per objective and credit; PCPO's variants share its blue
LOOKS: dict[str, tuple[int, Style]] = {
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


def line(name: str, x: Sequence[float], y: Sequence[float]) -> Line:
    color, style = LOOKS[name]
    return Line(CONTENDERS[name].title, x, y, style=style, color=color)


def band(name: str, x: Sequence[float], limits: Sequence[Interval]) -> Line:
    """The contender's curve with its intervals."""
    color, style = LOOKS[name]
    low, high = [i.low for i in limits], [i.high for i in limits]
    return Line(CONTENDERS[name].title, x, [i.value for i in limits], low, high, style, color)


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
    return figure(
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

    axis = "denoising step, noise first"
    panels = [
        Panel("Clip fraction", "update", "share of clipped terms", _each(found, curve("clip_fraction"), updates)),
        Panel("Clip fraction per step", axis, "share of clipped terms", steps("clip_fraction")),
        Panel("Taylor error per step", axis, "|log rho - (rho - 1)|", steps("taylor_error")),
        Panel("Gradient norm", "update", "norm", _each(found, curve("grad_norm"), updates)),
        Panel("Gradient norm per step", axis, "norm of the step's share", steps("grad_norm")),
        Panel("Unsteadiness of the gradient norm", axis, "std / mean over updates", steps("grad_norm", _unsteadiness)),
    ]
    logs = ("Taylor error per step", "Gradient norm", "Gradient norm per step")
    panels = [replace(p, log_y=True, note="log axis") if p.title in logs else p for p in panels]
    return figure(panels, columns=3, size=SIZE)


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
    return figure(panels, columns=2, size=(560, 380))


def forest(groups: Sequence[tuple[str, Sequence[tuple[str, Interval]]]], title: str, axis_title: str) -> Image.Image:
    """Effects with their limits, one row each, under the title of their group; 0 is a line."""
    rows = sum(len(effects) + 1 for _, effects in groups)
    left = 24 + max(text_width(CONTENDERS[name].title, 12) for _, effects in groups for name, _ in effects)
    width, top, row = 760, 52, 24
    canvas = Canvas(width, top + rows * row + 52)
    every = [v for _, effects in groups for _, i in effects for v in (i.value, i.low, i.high) if math.isfinite(v)]
    every.append(0.0)
    room = 0.05 * (max(every) - min(every)) or 1.0
    axis = Axis(min(every) - room, max(every) + room, left + 20, width - 24)
    canvas.text((24, 24), title, INK, 15)
    foot = top + rows * row
    marks = ticks(axis.low, axis.high, 7)
    for mark in marks:
        at = axis.at(mark)
        canvas.line([(at, top - 8), (at, foot)], MUTED if mark == 0 else GRID)
        canvas.text((at, foot + 12), written(mark, marks[1] - marks[0]), MUTED, 11, "mm")
    canvas.text(((axis.start + axis.end) / 2, foot + 34), axis_title, MUTED, 11, "mm")
    y = float(top)
    for name, effects in groups:
        canvas.box((24, y, 28 + text_width(name, 13), y + row), PAPER)
        canvas.text((24, y + row / 2), name, INK, 13)
        for effect in effects:
            y += row
            _draw_effect(canvas, axis, effect, left, y + row / 2)
        y += row
    return canvas.finish()


def _draw_effect(canvas: Canvas, axis: Axis, effect: tuple[str, Interval], left: float, y: float) -> None:
    name, found = effect
    color = COLORS[LOOKS[name][0]]
    canvas.text((left, y), CONTENDERS[name].title, INK, 12, "rm")
    if math.isfinite(found.low) and math.isfinite(found.high):
        low, high = axis.at(found.low), axis.at(found.high)
        canvas.line([(low, y), (high, y)], color, 2)
        for end in (low, high):
            canvas.line([(end, y - 4), (end, y + 4)], color, 2)
    canvas.dot(axis.at(found.value), y, color, 4.5)
