"""The look of every plot and image grid: colours, type sizes, and figures measured in pixels.

matplotlib is used by its object interface with explicit colours and sizes, so that neither pyplot nor another program's
style is touched or matters. It is imported where it is used: importing the library stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER, INK, MUTED, GRID, SHADE = "#ffffff", "#1f2933", "#66727f", "#e4e8ed", "#f1f3f5"
DESK = "#eef1f4"  # behind cards
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4b5563")  # Okabe and Ito
BETTER, WORSE = "#00785a", "#b84a00"
TITLE, HEADING, TEXT = 15, 13, 11  # type sizes
CHARACTER = 0.6  # mean width of a letter, times its size
LINE, THIN = 2.0, 1.0  # line widths
DOT, SMALL_DOT, ARROW = 6.0, 4.0, 9.0  # diameters of markers
FAINT, BAND = 0.35, 0.15  # opacities
ROUND = (1, 2, 2.5, 5, 10)  # steps of ticks, times powers of ten
DPI = 72  # a point is a pixel
SCALE = 2  # figures are drawn this many times larger and reduced, which smooths letters


def text_look(size: float = TEXT, color: str = MUTED) -> dict[str, Any]:
    """Literal text; dollar signs are not read as math."""
    return {"fontsize": size, "color": color, "parse_math": False}


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure of a size in pixels, drawn by Agg."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=SCALE * DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def render(figure: Figure) -> Image.Image:
    """The figure as an RGB image of its size in pixels."""
    canvas: Any = figure.canvas
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").reduce(SCALE)


def add_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes whose data area has these pixels, counted from the figure's upper left corner."""
    whole_width, whole_height = figure.get_size_inches() * DPI
    edges = left / whole_width, 1 - (top + height) / whole_height, width / whole_width, height / whole_height
    axes = figure.add_axes(edges, facecolor="none")
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set(color=MUTED, linewidth=THIN, zorder=1)
    axes.tick_params(which="both", colors=MUTED, labelsize=TEXT, width=THIN, length=0, pad=6)
    axes.grid(axis="y", color=GRID, linewidth=THIN, linestyle="-")
    axes.set_axisbelow(True)
    return axes


def power_text(value: float, _: float) -> str:
    """A very small or large number as 2.5e-4."""
    mantissa, exponent = f"{value:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"


def set_y_range(axes: Axes, low: float, high: float, steps: int = 6) -> None:
    """Limits around data, on round numbers where the axis is linear."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, ScalarFormatter

    if axes.get_yscale() == "log":
        room = max((high / low) ** 0.06, 1.3)
        low, high = low / room, high * room
        axes.set_ylim(low, high)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=steps + 1))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter((lambda value, _: f"{value:g}") if 1e-4 < low < high < 1e5 else power_text)
        return
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = (min(0.0, 2 * low), max(0.0, 2 * high)) if high else (0.0, 1.0)
    locator = MaxNLocator(steps, steps=ROUND)
    low, *_, high = locator.tick_values(low, high)
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(locator)
    plain = 1e-3 <= max(abs(low), abs(high)) < 1e5
    axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False) if plain else power_text)
