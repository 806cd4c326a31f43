"""Curves of one run, and several runs overlaid, from the rows of their metrics.jsonl."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import numpy as np
from PIL import Image

from comfyui_pcpo.plotting.panels import PANEL_SIZE, STEP_AXIS, Line, Panel, draw_panels

Record = Mapping[str, Any]
"""A row of metrics.jsonl."""
SMOOTHING = 0.6
LAST_QUARTER = "mean of the last quarter"


def smooth(values: Sequence[float], amount: float) -> list[float]:
    """Exponential mean with bias correction; NaN stays NaN and leaves the mean alone.

    m_i = amount m_{i-1} + (1 - amount) v_i,  result m_i / (1 - amount^i)
    """
    if not 0 <= amount < 1:
        raise ValueError(f"smoothing is {amount}, but must be at least 0 and below 1. 0.6 is a good start.")
    mean, weight, smoothed = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            mean, weight = amount * mean + (1 - amount) * value, amount * weight + (1 - amount)
        smoothed.append(mean / weight if math.isfinite(value) else math.nan)
    return smoothed


def _number(value: object) -> float:
    return float(value) if isinstance(value, Real) else math.nan


def column(records: Sequence[Record], *path: str) -> list[float]:
    """One metric of all records by its path, NaN where a record lacks it."""
    values = []
    for record in records:
        value: object = record
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        values.append(_number(value))
    return values


def _names(records: Sequence[Record], key: str) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in (record.get(key) or {})))


def _require_records(records: Sequence[Record], source: str = "metrics.jsonl") -> None:
    if not records:
        raise ValueError(f"{source} has no records to plot. Train for one update first.")


def _smoothed(label: str, x: Sequence[float], y: Sequence[float], amount: float, color: int) -> list[Line]:
    """The values as a faint line under their smooth one."""
    main = Line(label, x, smooth(y, amount), color=color)
    return [Line("", x, y, style="faint", color=color), main] if amount > 0 else [main]


def _held_out(records: Sequence[Record], amount: float) -> list[Line]:
    """Held-out rewards; as they are not measured in every update, their lines connect the measured ones."""
    lines = []
    for k, name in enumerate(_names(records, "held_out")):
        pairs = zip(column(records, "update"), column(records, "held_out", name), strict=True)
        measured = [(x, y) for x, y in pairs if math.isfinite(y)]
        x, y = [p[0] for p in measured], smooth([p[1] for p in measured], amount)
        lines.append(Line(f"{name} (held out)", x, y, style="dashed", color=1 + k))
    return lines


def _seconds(records: Sequence[Record]) -> np.ndarray:
    """Time from the start of the run to the end of each update."""
    parts = [column(records, key) for key in ("seconds_rollout", "seconds_reward", "seconds_update")]
    return np.cumsum(np.nansum(np.array(parts), axis=0))


def _duration(records: Sequence[Record]) -> str:
    seconds = float(_seconds(records)[-1])
    units = ((3600, "h", 1), (60, "min", 0), (1, "s", 0))
    size, unit, digits = next(u for u in units if seconds >= 2 * u[0] or u[0] == 1)
    return f"{len(records)} update{'s' * (len(records) > 1)} in {seconds / size:.{digits}f} {unit}"


def _reward_panels(records: Sequence[Record], smoothing: float) -> list[Panel]:
    """The trained reward with its spread and the held-out ones; with several rewards also one panel for each."""
    x, names = column(records, "update"), _names(records, "rewards")
    mean, spread = smooth(column(records, "reward_mean"), smoothing), smooth(column(records, "reward_std"), smoothing)
    low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
    label = names[0] if len(names) == 1 else "total"
    lines = _smoothed(label, x, column(records, "reward_mean"), smoothing, 0)
    lines[-1] = replace(lines[-1], low=low, high=high)
    others = {"right": _held_out(records, smoothing), "right_label": "held-out reward", "note": _duration(records)}
    panels = [Panel("Reward", "update", "mean and std of the images", lines, **others)]
    for name in names if len(names) > 1 else ():
        lines = _smoothed("", x, column(records, "rewards", name), smoothing, 0)
        panels.append(Panel(f"Reward: {name}", "update", "mean", lines))
    return panels


def _scalar_panels(key: str, title: str, label: str) -> Callable[[Sequence[Record], float], list[Panel]]:
    """One metric by update."""

    def panels(records: Sequence[Record], smoothing: float) -> list[Panel]:
        lines = _smoothed("", column(records, "update"), column(records, key), smoothing, 0)
        return [Panel(title, "update", label, lines)]

    return panels


def per_step(records: Sequence[Record], key: str) -> tuple[list[int], list[float]]:
    """Steps, and a metric per step averaged over the last quarter of a run: T indices, T values."""
    values: dict[int, list[float]] = {}
    for record in records[-max(1, len(records) // 4) :]:
        table = record.get("per_step") or {}
        for step, value in zip(table.get("steps", ()), table.get(key) or (), strict=False):
            values.setdefault(int(step), []).append(_number(value))
    finite = {step: [v for v in values[step] if math.isfinite(v)] for step in sorted(values)}
    return list(finite), [float(np.mean(v)) if v else math.nan for v in finite.values()]


def _per_step_panels(records: Sequence[Record], _: float) -> list[Panel]:
    clip, norm = per_step(records, "clip_fraction"), per_step(records, "grad_norm")
    if clip[1] and not any(clip[1]):  # nothing is clipped: no bars to draw
        lines = [Line("", *norm, style="points", color=1)]
        return [Panel("Per denoising step", STEP_AXIS, "gradient norm", lines, note=LAST_QUARTER)]
    bars = [Line("clip fraction", *clip, color=5)]
    right = {"right": [Line("gradient norm", *norm, style="points", color=1)], "right_label": "gradient norm"}
    return [Panel("Per denoising step", STEP_AXIS, "clip fraction", bars, bars=True, **right, note=LAST_QUARTER)]


def _guard_panels(records: Sequence[Record], _: float) -> list[Panel]:
    """What the guard measured on fixed noise, as changes from the base model; without lines where it was off."""
    title, label = "Guard", "change from the base model"
    measured = [record for record in records if record.get("guard")]
    if not measured:
        return [Panel(title, "update", label, [], note="no measurements")]
    x = column(measured, "update")

    def change(name: str) -> list[float]:
        return [-lost for lost in column(measured, "guard", "lost", name)]

    rewards = _names([record["guard"] for record in measured], "held_out")
    lines = [Line(f"{name} (std)", x, change(name), color=1 + k) for k, name in enumerate(rewards)]
    lines.append(Line("diversity (share)", x, change("diversity"), color=0))
    distance = [Line("distance", x, column(measured, "guard", "distance"), style="dashed", color=1 + len(rewards))]
    right = {"right": distance, "right_label": "distance from the base model", "note": "fixed noise"}
    return [Panel(title, "update", label, lines, hlines=(0.0,), **right)]


PANELS: dict[str, Callable[[Sequence[Record], float], list[Panel]]] = {
    "reward": _reward_panels,
    "clip": _scalar_panels("clip_fraction", "Clip fraction", "share of clipped terms"),
    "kl": _scalar_panels("kl", "KL to the reference", "KL per step, mean over latent"),
    "per_step": _per_step_panels,
    "guard": _guard_panels,
}


SPARSE = ("clip", "kl", "guard")
"""Panels that may be flat at 0, or have a single point."""


def has_signal(panel: Panel) -> bool:
    """Whether a panel by update has a line of two points or more that is not 0 everywhere."""
    values = [[v for v in line.y if math.isfinite(v)] for line in panel.all_lines()]
    return any(len(line) > 1 for line in values) and any(any(line) for line in values)


def curve_panels(records: Sequence[Record], smoothing: float, names: Sequence[str]) -> list[Panel]:
    """The named panels of a run: those with something to see, or all where none has."""
    _require_records(records)
    if not names:
        raise ValueError(f"No panels given. Name at least one of {', '.join(PANELS)}.")
    for name in names:
        if name not in PANELS:
            raise ValueError(f"panel '{name}' is not one of {', '.join(PANELS)}. Name one of these.")
    drawn = [(name, panel) for name in names for panel in PANELS[name](records, smoothing)]
    every = len(records) == 1
    seen = [p for name, p in drawn if p.all_lines() and (every or name not in SPARSE or has_signal(p))]
    return seen or [panel for _, panel in drawn]


def curves(
    records: Sequence[Record],
    smoothing: float = SMOOTHING,
    panels: Sequence[str] = tuple(PANELS),
    size: tuple[int, int] = PANEL_SIZE,
) -> Image.Image:
    """The curves of a run; `size` is that of a panel in pixels."""
    return draw_panels(curve_panels(records, smoothing, panels), size=size)


def _updates(records: Sequence[Record]) -> list[float]:
    return column(records, "update")


def _minutes(records: Sequence[Record]) -> list[float]:
    return list(_seconds(records) / 60)


def comparison_panels(runs: Mapping[str, Sequence[Record]], smoothing: float) -> list[Panel]:
    """Reward by update and by time, clip fraction, KL, and metrics per step; a colour for each run."""
    if not runs:
        raise ValueError("No runs to compare. Give {name: records}.")
    for name, records in runs.items():
        _require_records(records, f"run '{name}'")

    def lines(key: str, x: Callable[[Sequence[Record]], Sequence[float]]) -> list[Line]:
        each = [_smoothed(n, x(r), column(r, key), smoothing, k) for k, (n, r) in enumerate(runs.items())]
        return [line for group in each for line in group]

    def steps(key: str) -> list[Line]:
        return [Line(n, *per_step(r, key), style="points", color=k) for k, (n, r) in enumerate(runs.items())]

    return [
        Panel("Reward", "update", "mean reward", lines("reward_mean", _updates)),
        Panel("Reward by wall clock", "minutes", "mean reward", lines("reward_mean", _minutes)),
        *filter(
            has_signal,
            (
                Panel("Clip fraction", "update", "share of clipped terms", lines("clip_fraction", _updates)),
                Panel("KL to the reference", "update", "KL per step, mean over latent", lines("kl", _updates)),
            ),
        ),
        Panel("Clip fraction per step", STEP_AXIS, "clip fraction", steps("clip_fraction"), note=LAST_QUARTER),
        Panel("Gradient norm per step", STEP_AXIS, "gradient norm", steps("grad_norm"), note=LAST_QUARTER),
    ]


def compare_runs(runs: Mapping[str, Sequence[Record]], smoothing: float = SMOOTHING) -> Image.Image:
    """Several runs overlaid."""
    return draw_panels(comparison_panels(runs, smoothing))
