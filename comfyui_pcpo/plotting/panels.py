"""Panels with lines, bars and axes. In data, NaN is a gap and an infinite value an arrowhead at the edge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from comfyui_pcpo.plotting import style
from comfyui_pcpo.plotting.style import CHARACTER, INK, MUTED, TEXT, TITLE
from comfyui_pcpo.plotting.text import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LineStyle = Literal["line", "faint", "dashed", "points"]

PANEL_SIZE = (560, 360)  # of a panel
LEFT, RIGHT, BOTTOM = 64, 18, 46  # margins of its data area
RIGHT_AXIS = 48  # more of the right one where the panel has a second axis
TITLE_ROW, LEGEND_ROW, LEGEND_GAP = 34, 18, 8  # heights above the data area
FREE_ROWS = 4  # of a legend; a panel is higher by any more
HANDLE = 40  # width of a legend entry beside its text
Y_LABEL = 19  # from the edge of the panel to its y label
FEW_POINTS = 30  # with more points than this, markers are smaller
DASHES = ("-", ":", "-.")  # of lines beyond the palette's colours
STEP_AXIS = "denoising step, noise first"


@dataclass(frozen=True)
class Line:
    """One series; `low` and `high` bound a band, `color` is an index that lines may share."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    style: LineStyle = "line"
    color: int = 0


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

    def all_lines(self) -> list[Line]:
        return [*self.lines, *self.right]


def draw_panels(panels: Sequence[Panel], columns: int = 2, size: tuple[int, int] = PANEL_SIZE) -> Image.Image:
    """Panels of one size in rows, as an image."""
    return style.render(panel_figure(panels, columns, size))


def panel_figure(panels: Sequence[Panel], columns: int = 2, size: tuple[int, int] = PANEL_SIZE) -> Figure:
    """Panels of one size in rows; a last row that is not full shares the width."""
    if not panels:
        raise ValueError("No panels given. Give at least one.")
    columns = min(columns, len(panels))
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    widths = [columns * size[0] / len(row) for row in rows]
    legends = [[_legend(panel, width) for panel in row] for row, width in zip(rows, widths, strict=True)]
    more = [max(0, *(LEGEND_ROW * (legend.rows - FREE_ROWS) for legend in row)) for row in legends]
    figure = style.new_figure(columns * size[0], len(rows) * size[1] + sum(more))
    top = 0
    for k, row in enumerate(rows):
        for i, panel in enumerate(row):
            _add_panel(figure, panel, legends[k][i], (i * widths[k], top), (widths[k], size[1] + more[k]))
        top += size[1] + more[k]
    return figure


class Legend(NamedTuple):
    """A panel's labels as they are shown, one for each line, in rows of some columns."""

    labels: list[str]
    rows: int
    columns: int


def _data_width(panel: Panel, width: float) -> float:
    return width - LEFT - RIGHT - (RIGHT_AXIS if panel.right else 0)


def _legend(panel: Panel, width: float) -> Legend:
    """The legend of a panel of some width."""
    width = _data_width(panel, width)
    labels = [shorten(line.label, width - HANDLE, _estimated_width) for line in panel.all_lines()]
    columns = max(1, int(width // (HANDLE + max(map(_estimated_width, labels), default=0))))
    return Legend(labels, math.ceil(sum(map(bool, labels)) / columns), columns)


def _add_panel(
    figure: Figure, panel: Panel, shown: Legend, corner: tuple[float, float], size: tuple[float, float]
) -> None:
    """Title, note and legend above axes with the panel's lines."""
    width, labels, legend = _data_width(panel, size[0]), shown.labels, LEGEND_ROW * shown.rows
    top = TITLE_ROW + legend + LEGEND_GAP
    height = size[1] - top - BOTTOM
    axes = style.add_axes(figure, corner[0] + LEFT, corner[1] + top, width, height)
    _draw_frame(axes, panel, width, legend + 2 * LEGEND_GAP)
    artists = _draw_lines(axes, panel, panel.lines, panel.bars)
    if panel.right:
        second = axes.twinx()
        second.spines[:].set_visible(False)
        second.tick_params(colors=MUTED, labelsize=TEXT, length=0, pad=6)
        second.set_ylabel(panel.right_label, **style.text_look())
        second.yaxis.set_label_coords(1 + (RIGHT + RIGHT_AXIS - Y_LABEL) / width, 0.5)
        artists += _draw_lines(second, panel, panel.right)
    if legend:
        handles, texts = zip(*((a, label) for a, label in zip(artists, labels, strict=True) if label), strict=True)
        look: dict[str, Any] = {"frameon": False, "fontsize": TEXT, "labelcolor": INK, "columnspacing": 1.3}
        place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1 + LEGEND_GAP / height)}
        place |= {"borderpad": 0, "borderaxespad": 0}
        for text in axes.legend(handles, texts, ncols=shown.columns, **place, **look).get_texts():
            text.set_parse_math(False)


def _estimated_width(text: str) -> float:
    return CHARACTER * TEXT * len(text)


def _draw_frame(axes: Axes, panel: Panel, width: float, pad: float) -> None:
    """What is around and under the data: title, note, labels, shades, reference heights."""
    axes.set_title(panel.title, loc="left", pad=pad, **style.text_look(TITLE, INK))
    if CHARACTER * TITLE * len(panel.title) + _estimated_width(panel.note) < width:
        axes.set_title(panel.note, loc="right", pad=pad, **style.text_look())
    axes.set_xlabel(panel.x_label, labelpad=5, **style.text_look())
    axes.set_ylabel(f"{panel.y_label} (log scale)" if panel.log_y else panel.y_label, **style.text_look())
    axes.yaxis.set_label_coords((Y_LABEL - LEFT) / width, 0.5)
    axes.tick_params(axis="x", length=4, pad=4)
    if panel.log_y:
        axes.set_yscale("log", nonpositive="mask")
    for start, end in panel.shade:
        axes.axvspan(start, end, color=style.SHADE, linewidth=0, zorder=0)
    for height in panel.hlines:
        axes.axhline(height, color=MUTED, linewidth=style.THIN, linestyle=(0, (4, 3)))
    if all(np.isnan(line.y).all() for line in panel.all_lines()):
        look = style.text_look(style.HEADING)
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", va="center", **look)


def _draw_lines(axes: Axes, panel: Panel, lines: Sequence[Line], bars: bool = False) -> list[Any]:
    """Bars or lines within limits that fit, -> one artist for each."""
    artists = []
    for line in lines:
        y, color = np.asarray(line.y, float), style.PALETTE[line.color % len(style.PALETTE)]
        hidden = np.isinf(y) | (y <= 0 if axes.get_yscale() == "log" else False)
        shown = np.where(hidden, np.nan, y)
        if bars:
            artists.append(axes.bar(line.x, shown, color=color))
        else:
            artists.append(_draw_line(axes, line, shown, color))
        for value, height, marker in ((math.inf, 1, "^"), (-math.inf, 0, "v")):
            x = np.asarray(line.x, float)[y == value]
            look = {"color": color, "markersize": style.ARROW, "markeredgewidth": 0, "clip_on": False}
            axes.plot(x, np.full(len(x), height), marker, transform=axes.get_xaxis_transform(), **look)
    _set_limits(axes, panel)
    return artists


def _draw_line(axes: Axes, line: Line, y: np.ndarray, color: str) -> Any:
    """A line over its band; a point between two gaps is a dot."""
    if line.low is not None and line.high is not None:
        low, high = np.asarray(line.low, float), np.asarray(line.high, float)
        axes.fill_between(line.x, low, high, color=color, alpha=style.BAND, linewidth=0)
    gaps = np.isnan([math.nan, *y, math.nan])
    alone = ~gaps[1:-1] & gaps[:-2] & gaps[2:]
    faint = line.style == "faint"
    return axes.plot(
        line.x,
        y,
        color=color,
        alpha=style.FAINT if faint else 1,
        linewidth=style.THIN if faint else style.LINE,
        linestyle=(0, (3, 2)) if line.style == "dashed" else DASHES[line.color // len(style.PALETTE) % len(DASHES)],
        marker="o" if line.style == "points" or alone.any() else "",
        markevery=None if line.style == "points" else np.flatnonzero(alone).tolist(),
        markersize=style.DOT if len(y) <= FEW_POINTS or alone.any() else style.SMALL_DOT,
        markeredgewidth=0,
        clip_on=False,
    )[0]


def _set_limits(axes: Axes, panel: Panel) -> None:
    """Some room around the data; a scale of positive values starts at zero unless that would flatten them."""
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    values = [float(x) for line in panel.all_lines() for x in line.x if math.isfinite(x)] or [0.0, 1.0]
    room = 0.6 if panel.bars or min(values) == max(values) else 0.02 * (max(values) - min(values))
    axes.set_xlim(min(values) - room, max(values) + room)
    whole = all(x.is_integer() for x in values)
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=style.ROUND, integer=whole))
    axes.xaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    log = axes.get_yscale() == "log"
    low, high = axes.dataLim.intervaly
    if not math.isfinite(high - low):
        low, high = (0.1, 1.0) if log else (0.0, 1.0)
    elif not log and (panel.bars or 0 <= low <= 0.25 * high):
        low, high = min(low, 0.0), max(high, 0.0)
    style.set_y_range(axes, low, high)
