"""Panels with lines, bars and axes. In data, NaN is a gap and +inf an arrow at the top edge."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from PIL import Image

from comfyui_pcpo.plotting.axis import Axis, nice_step, tick_text, ticks
from comfyui_pcpo.plotting.canvas import COLORS, GRID, INK, MUTED, SHADE, Canvas, shorten, text_width

LEFT, RIGHT, BOTTOM = 58, 18, 46

Style = Literal["line", "faint", "dashed", "points"]


@dataclass(frozen=True)
class Line:
    """One series; `low` and `high` bound a band, `color` is an index that lines may share, -1 takes the next."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    style: Style = "line"
    color: int = -1

    def __post_init__(self) -> None:
        for name in ("y", "low", "high"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.x):
                counts = f"{len(self.x)} x values, but {len(values)} in {name}"
                raise ValueError(f"line '{self.label}' has {counts}. Give as many of each.")


@dataclass(frozen=True)
class Panel:
    """One pair of axes. `right` has its own axis, `hlines` are reference heights, `shade` are x ranges put in grey."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    log_y: bool = False
    bars: bool = False
    hlines: Sequence[float] = ()
    right: Sequence[Line] = ()
    right_label: str = ""
    shade: Sequence[tuple[float, float]] = ()
    note: str = ""


def _limits(lines: Sequence[Line], log: bool, extra: Sequence[float], from_zero: bool) -> tuple[float, float]:
    values = [v for s in lines for part in (s.y, s.low, s.high) if part is not None for v in part] + list(extra)
    values = [float(v) for v in values if math.isfinite(v) and (v > 0 or not log)]
    if not values:
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = min(values), max(values)
    if log:
        room = max((high / low) ** 0.06, 1.3)
        return low / room, high * room
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = (min(0.0, 2 * low), max(0.0, 2 * high)) if high else (0.0, 1.0)
    if from_zero or 0 <= low <= 0.25 * high:
        low, high = min(low, 0.0), max(high, 0.0)
    return _snapped(low, high)


def _snapped(low: float, high: float) -> tuple[float, float]:
    """Limits on round numbers."""
    for _ in range(2):  # wider limits may ask for a wider step
        step = nice_step(high - low)
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return low, high


def _x_limits(lines: Sequence[Line], bars: bool) -> tuple[float, float]:
    values = [float(v) for s in lines for v in s.x if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(values), max(values)
    room = 0.6 if bars or high == low else 0.02 * (high - low)
    return low - room, high + room


def _colored(panel: Panel) -> tuple[list[tuple[Line, str]], list[tuple[Line, str]]]:
    """Lines with their colours; lines without one take the next free in order, left before right."""
    every = (*panel.lines, *panel.right)
    taken = {s.color for s in every}
    free = iter([i for i in range(len(every) + len(taken)) if i not in taken])
    found = [(s, COLORS[(s.color if s.color >= 0 else next(free)) % len(COLORS)]) for s in every]
    return found[: len(panel.lines)], found[len(panel.lines) :]


def _runs(line: Line, keep: Callable[[int], bool]) -> list[list[int]]:
    """Indices of neighbouring points that may be drawn: a gap starts a new run."""
    runs: list[list[int]] = [[]]
    for i in range(len(line.x)):
        if keep(i):
            runs[-1].append(i)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _draw_band(canvas: Canvas, line: Line, color: str, x: Axis, y: Axis) -> None:
    low, high = line.low, line.high
    if low is None or high is None:
        return
    for run in _runs(line, lambda i: y.drawable(low[i]) and y.drawable(high[i])):
        edge = [(x.at(line.x[i]), y.at(high[i])) for i in run] + [(x.at(line.x[i]), y.at(low[i])) for i in run[::-1]]
        if len(edge) > 2:
            canvas.polygon(edge, color + "26")


def _dashes(points: Sequence[tuple[float, float]], on: float = 6, off: float = 4) -> list[list[tuple[float, float]]]:
    """A path cut into dashes of even length along it."""
    path = np.array(points)
    reach = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(path, axis=0).T))])
    found = []
    for start in np.arange(0, reach[-1], on + off):
        end = min(start + on, reach[-1])
        at = [start, *reach[(reach > start) & (reach < end)], end]
        found.append([(float(np.interp(s, reach, path[:, 0])), float(np.interp(s, reach, path[:, 1]))) for s in at])
    return found


def _draw_line(canvas: Canvas, line: Line, color: str, x: Axis, y: Axis) -> None:
    for run in _runs(line, lambda i: y.drawable(line.y[i])):
        points = [(x.at(line.x[i]), y.at(line.y[i])) for i in run]
        if len(points) > 1 and line.style == "dashed":
            for dash in _dashes(points):
                canvas.line(dash, color, 2)
        elif len(points) > 1:
            faint = line.style == "faint"
            canvas.line(points, color + "59" if faint else color, 1 if faint else 2)
        if len(points) == 1 or line.style == "points":
            for at in points:
                canvas.dot(*at, color, 3 if len(line.x) <= 30 or len(points) == 1 else 2)
    for i in (i for i, v in enumerate(line.y) if v == math.inf):
        at, top = x.at(line.x[i]), y.end
        canvas.line([(at, top + 6), (at, top + 18)], color, 2)
        canvas.polygon([(at - 4.5, top + 8), (at + 4.5, top + 8), (at, top)], color)


def _draw_bars(canvas: Canvas, lines: Sequence[tuple[Line, str]], x: Axis, y: Axis) -> None:
    """Bars side by side, each group as wide as 0.8 of the smallest distance between x values."""
    places = sorted({float(v) for line, _ in lines for v in line.x})
    gap = min((b - a for a, b in pairwise(places)), default=1.0)
    width = 0.8 * gap / max(len(lines), 1)
    foot = y.start if y.log else y.at(min(max(0.0, y.low), y.high))
    for k, (line, color) in enumerate(lines):
        for place, value in zip(line.x, line.y, strict=True):
            if y.drawable(value):
                left = x.at(place - 0.4 * gap + k * width)
                top, bottom = sorted((y.at(value), foot))
                canvas.box((left, top, max(x.at(place - 0.4 * gap + (k + 1) * width) - 0.5, left + 1), bottom), color)


def _legend(canvas: Canvas, entries: Sequence[tuple[Line, str]], bars: int, edges: tuple[float, float, float]) -> float:
    """Draw the legend from (left, top) to `right` and return the height below it."""
    left, top, right = edges
    entries = [e for e in entries if e[0].label]
    x, y = left, top
    for k, (line, color) in enumerate(entries):
        label = shorten(line.label, 11, right - left - 24)
        width = 24 + text_width(label, 11) + 14
        if x > left and x + width - 14 > right:
            x, y = left, y + 17
        if k < bars:
            canvas.box((x + 4, y + 3, x + 15, y + 13), color, 2)
        elif line.style == "dashed":
            canvas.line([(x, y + 8), (x + 7, y + 8)], color, 2)
            canvas.line([(x + 11, y + 8), (x + 18, y + 8)], color, 2)
        else:
            canvas.line([(x, y + 8), (x + 18, y + 8)], color, 2)
        if line.style == "points" and k >= bars:
            canvas.dot(x + 9, y + 8, color, 3)
        canvas.text((x + 24, y + 8), label)
        x += width
    return y + 20 if entries else top


def _y_ticks(canvas: Canvas, axis: Axis, at: float, anchor: str, width: float = 0) -> None:
    """Numbers beside an axis at pixel `at`; `width` > 0 draws gridlines that far to the right."""
    marks = ticks(axis.low, axis.high, log=axis.log)
    for value in marks:
        y = axis.at(value)
        if width:
            canvas.line([(at, y), (at + width, y)], GRID)
        step = 0.0 if axis.log or len(marks) < 2 else marks[1] - marks[0]
        canvas.text((at + (6 if anchor == "lm" else -6), y), tick_text(value, step), MUTED, 11, anchor)


def _x_ticks(canvas: Canvas, axis: Axis, y: float, whole: bool) -> None:
    """Numbers below an axis; `whole` keeps to whole ones."""
    marks = [v for v in ticks(axis.low, axis.high, 7) if not whole or abs(v - round(v)) < 1e-6]
    step = marks[1] - marks[0] if len(marks) > 1 else 1.0
    for value in marks:
        canvas.line([(axis.at(value), y), (axis.at(value), y + 4)], MUTED)
        canvas.text((axis.at(value), y + 13), tick_text(value, step), MUTED, 11, "mm")


def _draw_right(canvas: Canvas, panel: Panel, lines: Sequence[tuple[Line, str]], x: Axis, y: Axis) -> None:
    """The second axis with its lines."""
    right = Axis(*_limits(panel.right, False, (), panel.bars), y.start, y.end)
    _y_ticks(canvas, right, x.end, "lm")
    for line, color in lines:
        _draw_line(canvas, line, color, x, right)
    canvas.vertical_text((x.end + 48, (y.start + y.end) / 2), panel.right_label)


def _draw_frame(canvas: Canvas, panel: Panel, x: Axis, y: Axis) -> None:
    """What lies under the data: shades, gridlines, numbers, labels, reference heights."""
    for start, end in panel.shade:
        canvas.box((max(x.at(start), x.start), y.end, min(x.at(end), x.end), y.start), SHADE)
    _y_ticks(canvas, y, x.start, "rm", x.end - x.start)
    for value in panel.hlines:
        for dash in _dashes([(x.start, y.at(value)), (x.end, y.at(value))], 4, 3):
            canvas.line(dash, MUTED)
    canvas.line([(x.start, y.start), (x.end, y.start)], MUTED)
    _x_ticks(canvas, x, y.start, all(float(v).is_integer() for s in (*panel.lines, *panel.right) for v in s.x))
    canvas.text(((x.start + x.end) / 2, y.start + 31), panel.x_label, MUTED, 11, "mm")
    canvas.vertical_text((x.start - LEFT + 13, (y.start + y.end) / 2), panel.y_label)


def _draw_panel(canvas: Canvas, panel: Panel, left: float, top: float, size: tuple[float, float]) -> None:
    lines, right = _colored(panel)
    start, end = left + LEFT, left + size[0] - (RIGHT + 50 if panel.right else RIGHT)
    canvas.text((start, top + 18), shorten(panel.title, 15, end - start), INK, 15)
    if text_width(panel.title, 15) + text_width(panel.note, 11) + 12 <= end - start:
        canvas.text((end, top + 19), panel.note, MUTED, 11, "rm")
    bars = len(lines) if panel.bars else 0
    head, floor = _legend(canvas, [*lines, *right], bars, (start, top + 32, end)) + 8, top + size[1] - BOTTOM
    x = Axis(*_x_limits([*panel.lines, *panel.right], panel.bars), start, end)
    y = Axis(*_limits(panel.lines, panel.log_y, panel.hlines, panel.bars), floor, head, panel.log_y)
    _draw_frame(canvas, panel, x, y)
    for line, color in lines:
        _draw_band(canvas, line, color, x, y)
    if panel.bars:
        _draw_bars(canvas, lines, x, y)
    for line, color in lines[bars:]:
        _draw_line(canvas, line, color, x, y)
    if right:
        _draw_right(canvas, panel, right, x, y)
    if all(math.isnan(v) for s in (*panel.lines, *panel.right) for v in s.y):
        canvas.text(((start + end) / 2, (head + floor) / 2), "no data", MUTED, 13, "mm")


def figure(panels: Sequence[Panel], columns: int = 2, size: tuple[int, int] = (560, 360)) -> Image.Image:
    """Panels of one size in rows; a last row that is not full shares the width."""
    if not panels:
        raise ValueError("figure has 0 panels, but needs at least 1. Name one of reward, clip, kl, per_step.")
    columns = min(columns, len(panels))
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    canvas = Canvas(columns * size[0], len(rows) * size[1])
    for k, row in enumerate(rows):
        width = columns * size[0] / len(row)
        for i, panel in enumerate(row):
            _draw_panel(canvas, panel, i * width, k * size[1], (width, size[1]))
    return canvas.finish()


# A run
