"""A picture of an evaluation: each metric before and after, a faint line for each seed, a thick one for their mean."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from comfyui_pcpo.metrics.paired import estimate, paired
from comfyui_pcpo.plotting.axis import Axis, nice_step, tick_text, ticks
from comfyui_pcpo.plotting.canvas import COLORS, DOWN, GRID, INK, MUTED, UP, Canvas, shorten

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 280, 260, 62, 24, 66, 34


@dataclass(frozen=True)
class Slope:
    """One metric over seeds; `lower` says that less is better, `role` stands under the name."""

    name: str
    role: str
    before: Sequence[float]
    after: Sequence[float]
    lower: bool = False


def difference_text(slope: Slope) -> str:
    """The mean difference, its standard error and the paired test's p, as far as there are any."""
    found = paired(slope.before, slope.after)
    d = found.difference
    if not d.count:
        return "no value"
    text = f"{d.mean:+.3g}"
    if d.error > 0 and math.isfinite(d.error):
        digits = max(0, 1 - math.floor(math.log10(d.error)))  # two digits of the error
        text = f"{d.mean:+.{digits}f} \u00b1 {d.error:.{digits}f}"
    return text + (f", {chance(found.p)}" if math.isfinite(found.p) else "")


def color(slope: Slope) -> str:
    """Green for better, red for worse, grey for what may be chance."""
    found = paired(slope.before, slope.after)
    if not found.p < 0.05:
        return MUTED
    return UP if (found.difference.mean < 0) == slope.lower else DOWN


def chance(p: float) -> str:
    """A p-value as it is written."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def draw(slopes: Sequence[Slope], columns: int = 4) -> Image.Image:
    """One panel for each metric."""
    if not slopes:
        raise ValueError("the picture has 0 metrics, but needs at least 1. Name a reward.")
    columns = min(columns, len(slopes))
    rows = math.ceil(len(slopes) / columns)
    canvas = Canvas(columns * WIDTH, rows * HEIGHT + 10)
    for k, slope in enumerate(slopes):
        _draw(canvas, slope, k % columns * WIDTH, k // columns * HEIGHT)
    return canvas.finish()


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Round limits with some room above and below."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - (abs(low) or 1), high + (abs(high) or 1)
    low, high = low - 0.08 * (high - low), high + 0.08 * (high - low)
    for _ in range(2):  # wider limits may ask for a wider step
        step = nice_step(high - low, 4)
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return low, high


def _draw(canvas: Canvas, slope: Slope, left: float, top: float) -> None:
    """Title, role and difference over an axis with its two sides."""
    start, end, floor = left + LEFT, left + WIDTH - RIGHT, top + HEIGHT - BOTTOM
    canvas.text((start, top + 20), shorten(slope.name, 14, end - start), INK, 14)
    canvas.text((start, top + 39), shorten(slope.role, 11, end - start), MUTED, 11)
    pairs = [(a, b) for a, b in zip(slope.before, slope.after, strict=True) if math.isfinite(a) and math.isfinite(b)]
    mean = estimate(slope.before).mean, estimate(slope.after).mean
    canvas.text((start, top + 56), difference_text(slope), color(slope), 12)
    places = start + 0.2 * (end - start), start + 0.8 * (end - start)
    for place, label in zip(places, ("before", "after"), strict=True):
        canvas.text((place, floor + 14), label, MUTED, 11, "mm")
    if not pairs:
        return
    axis = Axis(*_limits([v for pair in pairs for v in pair]), floor, top + TOP + 10)
    marks = ticks(axis.low, axis.high, 4)
    for mark in marks:
        canvas.line([(start, axis.at(mark)), (end, axis.at(mark))], GRID)
        canvas.text((start - 6, axis.at(mark)), tick_text(mark, marks[1] - marks[0]), MUTED, 11, "rm")
    for a, b in pairs:
        canvas.line([(places[0], axis.at(a)), (places[1], axis.at(b))], COLORS[6] + "59")
    points = [(place, axis.at(v)) for place, v in zip(places, mean, strict=True)]
    canvas.line(points, COLORS[0], 2.5)
    for at in points:
        canvas.dot(*at, COLORS[0], 4)
