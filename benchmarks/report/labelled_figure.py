"""Panels of lines that have their names at their ends, so that no legend has to be searched."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from matplotlib.patheffects import withStroke
from PIL import Image

from comfyui_pcpo.plotting import style
from comfyui_pcpo.plotting.panels import LineStyle
from comfyui_pcpo.plotting.style import GRID, HEADING, INK, MUTED, PALETTE, TEXT, TITLE, text_look

from ..study.methods import STUDY_METHODS
from ..study.statistics import Interval
from .looks import GAIN_LABEL, LOOKS

PANEL, LEFT, TOP, ROW_TOP, BOTTOM = (400, 300), 66, 76, 34, 52  # pixels
LABEL_GAP = 8  # before a label
LABEL_ROW = 16  # between two labels
NEAR = 0.8  # of the limit


@dataclass(frozen=True)
class LabelledLine:
    """Points from left to right or as a path, and what is written at the last one."""

    title: str
    x: Sequence[float]
    y: Sequence[float]
    color: str
    style: LineStyle = "line"
    reach: Interval | None = None  # of the last point's y


class LabelledPanel(NamedTuple):
    """One pair of axes; `limit` is an x that a dashed line marks if any line comes near it."""

    title: str
    x_label: str
    lines: Sequence[LabelledLine]
    limit: float | None = None


def method_line(
    method: str, x: Sequence[float], y: Sequence[float], title: str = "", reach: Interval | None = None
) -> LabelledLine:
    """A line in the look of a method, named after it unless it has a title of its own."""
    color, look = LOOKS[method]
    return LabelledLine(title or STUDY_METHODS[method].title, x, y, PALETTE[color], look, reach)


def labelled_figure(panels: Sequence[LabelledPanel], title: str, note: str) -> Image.Image:
    """Panels of reward gained, two to a row, under a title and a note of up to two lines."""
    columns = min(2, len(panels))
    longest = max(len(line.title) for panel in panels for line in panel.lines)
    width = LEFT + PANEL[0] + 2 * LABEL_GAP + style.CHARACTER * TEXT * longest
    height = ROW_TOP + PANEL[1] + BOTTOM
    total = TOP + height * -(-len(panels) // columns)
    figure = style.new_figure(width * columns, total)
    look = {"x": 0.01, "ha": "left", "va": "top"}
    figure.suptitle(title, y=1 - 9 / total, **look, **text_look(TITLE, INK))
    figure.text(y=1 - 42 / total, s=note, **look, **text_look())
    for place, panel in enumerate(panels):
        row, column = divmod(place, columns)
        _draw_panel(style.add_axes(figure, column * width + LEFT, TOP + row * height + ROW_TOP, *PANEL), panel)
    return style.render(figure)


def _draw_panel(axes: Any, panel: LabelledPanel) -> None:
    axes.set_title(panel.title, loc="left", **text_look(HEADING, INK))
    axes.grid(axis="x", color=GRID)
    dashes = (0, (4, 3))
    if panel.limit is not None and max(x for line in panel.lines for x in line.x) > NEAR * panel.limit:
        axes.axvline(panel.limit, color=MUTED, linewidth=style.THIN, linestyle=dashes)
    for line in panel.lines:
        if line.style == "faint":
            axes.plot(line.x, line.y, color=line.color, linewidth=style.THIN, alpha=style.FAINT)
            axes.plot(line.x[-1:], line.y[-1:], "o", color=line.color, markersize=style.DOT)
        else:
            look = {"linestyle": dashes if line.style == "dashed" else "-", "marker": "o"}
            axes.plot(line.x, line.y, color=line.color, linewidth=style.LINE, markersize=style.SMALL_DOT, **look)
        if line.reach is not None:
            bar = {"color": line.color, "alpha": 0.6, "linewidth": style.THIN}
            axes.vlines(line.x[-1], line.reach.low, line.reach.high, **bar)
    axes.set_xlabel(panel.x_label, **text_look(TEXT))
    axes.set_ylabel(GAIN_LABEL, **text_look(TEXT))
    _label_ends(axes, panel.lines)


def _label_ends(axes: Any, lines: Sequence[LabelledLine]) -> None:
    """Names at the ends of the lines, moved up where they would overlap."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    row, letter = LABEL_ROW / PANEL[1] * (high - low), style.CHARACTER * TEXT / PANEL[0] * (right - left)
    placed: list[tuple[float, float, float]] = []  # left and right end, height
    for line in sorted(lines, key=lambda line: line.y[-1]):
        x, stop = line.x[-1], line.x[-1] + letter * (len(line.title) + 2)
        height = max([line.y[-1], *(below + row for start, end, below in placed if start < stop and x < end)])
        placed.append((x, stop, height))
        halo = {"path_effects": [withStroke(linewidth=4, foreground="white")]}
        look = text_look(TEXT, line.color) | halo | {"va": "center"}
        axes.annotate(line.title, (x, height), (LABEL_GAP, 0), textcoords="offset points", zorder=5, **look)
