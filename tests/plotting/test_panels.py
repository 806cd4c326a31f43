"""Claims about panels: series and where they are drawn, gaps, infinite values, limits, labels, legends, sizes."""

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from comfyui_pcpo.plotting import style
from comfyui_pcpo.plotting.panels import PANEL_SIZE, Line, Panel, draw_panels, panel_figure
from comfyui_pcpo.plotting.style import PALETTE


def axes_of(*lines: Line, **options: object) -> list[Axes]:
    figure = panel_figure([Panel("title", "x", "y", lines, **options)])  # type: ignore[arg-type]
    style.render(figure)
    return figure.axes


def drawn(axes: Axes, color: str = PALETTE[0]) -> np.ndarray:
    """The y values of the first line with a colour."""
    line = next(line for line in axes.lines if to_hex(line.get_color()) == color and line.get_linestyle() != "None")
    return np.asarray(line.get_ydata(), float)


def markers(axes: Axes, marker: str) -> list[tuple[float, float]]:
    """The points drawn with a marker."""
    return [
        (x, y)
        for line in axes.lines
        if line.get_marker() == marker
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)  # type: ignore[arg-type]
    ]


def near(panel: Panel, color: str) -> np.ndarray:
    """Where a panel's image has about a colour, (H, W)."""
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    return np.abs(np.asarray(draw_panels([panel])).astype(int) - wanted).max(-1) <= 40


def test_an_image_has_the_size_of_its_panels():
    panel = Panel("title", "x", "y", [Line("a", [0, 1], [0, 1])])
    assert draw_panels([panel]).size == PANEL_SIZE
    assert draw_panels([panel] * 3).size == (2 * PANEL_SIZE[0], 2 * PANEL_SIZE[1])
    assert draw_panels([panel] * 3, columns=3, size=(300, 200)).size == (900, 200)


def test_a_last_row_that_is_not_full_shares_the_width():
    figure = panel_figure([Panel("", "", "", [])] * 3)
    first, _, last = (axes.get_position().width for axes in figure.axes)
    assert last > 2 * first


def test_a_line_is_drawn_through_the_pixels_of_its_data():
    panel = Panel("", "", "", [Line("", [0, 10], [0.0, 1.0])])
    image = near(panel, PALETTE[0])
    axes = panel_figure([panel]).axes[0]
    for value in (1, 3, 5, 7, 9):
        x, y = axes.transData.transform((value, value / 10)) / style.SCALE
        rows = np.flatnonzero(image[:, round(x)])
        assert abs(PANEL_SIZE[1] - rows.mean() - y) <= 2


def test_nan_leaves_a_gap():
    y = [1.0, 2, 3, math.nan, math.nan, math.nan, 3, 2, 1, 1]
    np.testing.assert_array_equal(drawn(axes_of(Line("", range(10), y))[0]), y)
    columns = np.flatnonzero(near(Panel("", "", "", [Line("", range(10), y)]), PALETTE[0]).any(0))
    assert np.diff(columns).max() > 100


def test_what_a_logarithmic_axis_cannot_show_is_a_gap():
    y = [1.0, 10, 100, 0, -1, 0, 100, 10, 1, 1]
    shown = drawn(axes_of(Line("", range(10), y), log_y=True)[0])
    np.testing.assert_array_equal(np.isfinite(shown), np.array(y) > 0)


def test_only_a_logarithmic_axis_is_labelled_as_such():
    line = Line("", [0, 1], [1.0, 100.0])
    log, linear = (axes_of(line, log_y=log_y)[0] for log_y in (True, False))
    assert (log.get_yscale(), log.get_ylabel()) == ("log", "y (log scale)")
    assert (linear.get_yscale(), linear.get_ylabel()) == ("linear", "y")


def test_one_point_between_gaps_is_a_dot():
    y = [math.nan] * 4 + [1.0] + [math.nan] * 5
    assert 10 < near(Panel("", "", "", [Line("", range(10), y)]), PALETTE[0]).sum() < 80


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-7, 1e9])
def test_a_constant_series_is_a_level_line(value: float):
    rows = np.flatnonzero(near(Panel("", "", "", [Line("", range(5), [value] * 5)]), PALETTE[0]).any(1))
    assert 1 <= len(rows) <= 4


@pytest.mark.parametrize("log", [False, True])
def test_a_series_without_numbers_says_no_data(log: bool):
    panel = Panel("", "", "", [Line("", range(5), [math.nan] * 5)], log_y=log)
    assert not near(panel, PALETTE[0]).any()
    assert [text.get_text() for text in panel_figure([panel]).axes[0].texts] == ["no data"]


def test_infinite_values_are_arrowheads_at_the_edges():
    axes = axes_of(Line("", range(10), [1.0] * 8 + [math.inf, -math.inf]))[0]
    assert markers(axes, "^") == [(8, 1)] and markers(axes, "v") == [(9, 0)]
    image = near(Panel("", "", "", [Line("", range(10), [1.0] * 9 + [math.inf])]), PALETTE[0])
    columns = np.flatnonzero(image[30:50].any(0))  # the upper edge of the axes
    assert 3 <= len(columns) <= 12


def test_bars_rise_from_zero_to_their_data():
    axes = axes_of(Line("", [0, 1], [1.0, 2.0]), bars=True)[0]
    assert [(bar.get_y(), bar.get_height()) for bar in axes.patches] == [(0, 1.0), (0, 2.0)]  # type: ignore[attr-defined]
    assert axes.get_ylim()[0] == 0


def test_the_legend_is_above_the_data_however_long_it_is():
    names = [f"a run with a rather long name, number {k}" for k in range(7)]
    axes = axes_of(*(Line(name, [0, 10], [1.0, 1.0]) for name in names), hlines=(2.0,))[0]
    legend = axes.get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == names
    edges = legend.get_window_extent()
    assert edges.y0 >= axes.get_window_extent().y1 and edges.x1 <= PANEL_SIZE[0] * style.SCALE
    title = next(text for text in axes.get_children() if getattr(text, "get_text", str)() == "title")
    assert title.get_window_extent().y0 >= edges.y1  # type: ignore[call-arg]


def test_a_panel_of_many_lines_is_higher_and_lines_of_one_color_differ_in_their_dashes():
    names = [f"a run with a rather long name, number {k:02}" for k in range(24)]
    figure = panel_figure([Panel("title", "x", "y", [Line(n, [0, 1], [k, k], color=k) for k, n in enumerate(names)])])
    axes = figure.axes[0]
    alone = panel_figure([Panel("title", "x", "y", [Line("", [0, 1], [1.0, 1.0])])]).axes[0]
    assert axes.get_window_extent().height > alone.get_window_extent().height / 2
    looks = {(line.get_color(), line.get_linestyle()) for line in axes.lines if len(line.get_xdata())}
    assert len(looks) == 3 * len(style.PALETTE)


def test_names_with_dollar_signs_are_written_as_they_are():
    name = "costs $5 \\and{ $"
    figure = panel_figure([Panel(name, name, name, [Line(name, [0], [1.0])], note=name)])
    assert style.render(figure).size == PANEL_SIZE


def test_a_band_is_lighter_than_its_line():
    line = Line("", [0, 1], [1.0, 1.0], low=[0.5, 0.5], high=[1.5, 1.5])
    area = np.asarray(draw_panels([Panel("", "", "", [line], hlines=(0.0,))]))[70:300, 80:520]
    tinted = (area[..., 2].astype(int) - area[..., 0] > 20).mean()
    assert 0.6 < tinted < 0.95


def test_a_second_axis_has_its_own_limits():
    left, right = axes_of(Line("", [0, 1], [0.0, 1.0]), right=[Line("", [0, 1], [0.0, 500.0], color=1)])
    assert left.get_ylim() == (0, 1) and right.get_ylim() == (0, 500)
    assert drawn(right, PALETTE[1]).tolist() == [0, 500]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0, 50, ["0", "10", "20", "30", "40", "50"]),
        (0, 2e-4, ["0", "5e-5", "1e-4", "1.5e-4", "2e-4"]),
        (0, 3e5, ["0", "5e4", "1e5", "1.5e5", "2e5", "2.5e5", "3e5"]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: Sequence[str]):
    axes = axes_of(Line("", [0, 1], [low, high]))[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == expected


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.01, 100, ["0.01", "0.1", "1", "10", "100"]), (0.1, 2, ["0.1", "0.2", "0.5", "1", "2"])],
)
def test_ticks_of_a_logarithmic_axis_are_powers_of_ten_and_more_where_these_are_few(low, high, expected):
    axes = axes_of(Line("", [0, 1], [low, high]), log_y=True)[0]
    bottom, top = axes.get_ylim()
    shown = [label.get_text() for label in axes.get_yticklabels() if bottom <= label.get_position()[1] <= top]
    assert shown == expected


def test_no_panels_are_refused():
    with pytest.raises(ValueError, match="No panels given"):
        draw_panels([])


def test_lines_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="same first dimension"):
        draw_panels([Panel("", "", "", [Line("a", [0, 1], [0])])])


def test_drawing_changes_no_global_state_of_matplotlib():
    before = dict(matplotlib.rcParams)
    draw_panels([Panel("", "", "", [Line("", [0, 1], [1.0, 100.0])], log_y=True)])
    assert dict(matplotlib.rcParams) == before
