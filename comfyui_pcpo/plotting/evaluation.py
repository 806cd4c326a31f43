"""Metrics before and after training: a faint line for each seed, a thick one for their mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from comfyui_pcpo.metrics.paired import estimate, paired
from comfyui_pcpo.plotting import style
from comfyui_pcpo.plotting.style import BETTER, CHARACTER, HEADING, INK, MUTED, PALETTE, TEXT, TITLE, WORSE
from comfyui_pcpo.plotting.text import shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SLOPE_SIZE = (330, 260)  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 62, 24, 76, 34  # margins of its data area
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Slope:
    """One metric over seeds; `lower` says that less is better, `role` is written under the name."""

    name: str
    role: str
    before: Sequence[float]
    after: Sequence[float]
    lower: bool = False


def difference_text(slope: Slope) -> str:
    """The mean difference, its standard error and the paired test's p, as far as there are any."""
    test = paired(slope.before, slope.after)
    d = test.difference
    if not d.count:
        return "no value"
    text = f"{d.mean:+.3g}"
    if d.error > 0 and math.isfinite(d.error):
        digits = max(0, 1 - math.floor(math.log10(d.error)))  # two digits of the error
        text = f"{d.mean:+.{digits}f} \u00b1 {d.error:.{digits}f}"
    return text + (f", {_p_text(test.p)}" if math.isfinite(test.p) else "")


def _p_text(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def slope_color(slope: Slope) -> str:
    """Green for better, red for worse, grey for what may be chance."""
    test = paired(slope.before, slope.after)
    if not test.p < SIGNIFICANT:
        return MUTED
    return BETTER if (test.difference.mean < 0) == slope.lower else WORSE


def slope_chart(slopes: Sequence[Slope], columns: int = 4) -> Image.Image:
    """A panel for each metric, as an image."""
    return style.render(slope_figure(slopes, columns))


def slope_figure(slopes: Sequence[Slope], columns: int = 4) -> Figure:
    """A panel for each metric, in rows."""
    if not slopes:
        raise ValueError("No metrics to draw. Name a reward.")
    columns = min(columns, len(slopes))
    figure = style.new_figure(columns * SLOPE_SIZE[0], math.ceil(len(slopes) / columns) * SLOPE_SIZE[1] + 10)
    for k, slope in enumerate(slopes):
        _add_slope(figure, slope, k % columns * SLOPE_SIZE[0], k // columns * SLOPE_SIZE[1])
    return figure


def _add_slope(figure: Figure, slope: Slope, left: float, top: float) -> None:
    """Name, role and difference above the two sides."""
    left, width = left + LEFT, SLOPE_SIZE[0] - LEFT - RIGHT
    axes = style.add_axes(figure, left, top + TOP, width, SLOPE_SIZE[1] - TOP - BOTTOM)
    name, role = (shorten(text, width, lambda t: CHARACTER * TITLE * len(t)) for text in (slope.name, slope.role))
    for text, size, color, height in (
        (name, TITLE, INK, 50),
        (role, TEXT, MUTED, 34),
        (difference_text(slope), HEADING - 1, slope_color(slope), 15),
    ):
        axes.annotate(text, (0, 1), (0, height), "axes fraction", "offset points", **style.text_look(size, color))
    axes.spines["bottom"].set_visible(False)
    axes.set_xlim(-1 / 3, 4 / 3)
    axes.set_xticks((0, 1), ("before", "after"))
    pairs = [(a, b) for a, b in zip(slope.before, slope.after, strict=True) if math.isfinite(a) and math.isfinite(b)]
    if not pairs:
        axes.yaxis.set_visible(False)
        return
    for pair in pairs:
        axes.plot((0, 1), pair, color=PALETTE[6], alpha=style.FAINT, linewidth=style.THIN)
    mean = estimate([a for a, _ in pairs]).mean, estimate([b for _, b in pairs]).mean
    axes.plot((0, 1), mean, color=PALETTE[0], linewidth=style.LINE + 0.5, marker="o", markersize=style.DOT + 2)
    low, high = axes.dataLim.intervaly
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    style.set_y_range(axes, low - room, high + room, 4)
