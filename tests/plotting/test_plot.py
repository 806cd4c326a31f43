"""Claims about the pictures: sizes, where data lands, gaps, arrows, and messages for data that cannot be drawn."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image

from comfyui_pcpo.plotting import canvas, figure, plot
from comfyui_pcpo.plotting.axis import Axis, tick_text, ticks
from comfyui_pcpo.plotting.canvas import COLORS
from comfyui_pcpo.plotting.figure import Line, Panel

SIZE = (560, 360)


def record(update: int, **changes: object) -> dict:
    table = {"steps": [0, 1, 2], "clip_fraction": [0.1, 0.2, 0.3], "grad_norm": [1.0, 0.5, 0.25]}
    seconds = {"seconds_rollout": 1.0, "seconds_reward": 0.5, "seconds_update": 1.5}
    values = {"update": update, "reward_mean": 0.1 * update, "reward_std": 0.2, "rewards": {"jpeg": 0.1 * update}}
    return (
        values | seconds | {"held_out": {"align": 0.3}, "clip_fraction": 0.2, "kl": 1e-4, "per_step": table} | changes
    )


def near(image: Image.Image, color: str, tolerance: int = 40) -> np.ndarray:
    """Where a picture has a colour, (H, W)."""
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    return np.abs(np.asarray(image).astype(int) - wanted).max(-1) <= tolerance


def plotting_area(image: Image.Image) -> np.ndarray:
    """The part of a single panel without its title and legend."""
    return np.asarray(image)[70 : SIZE[1] - figure.BOTTOM, figure.LEFT : SIZE[0] - figure.RIGHT]


def drawn_columns(y: Sequence[float], color: str = COLORS[0], **options: object) -> np.ndarray:
    """For ten points at x = 0..9, whether colour was drawn close to each."""
    image = figure.figure([Panel("", "", "", [Line("", range(10), y)], **options)])  # type: ignore[arg-type]
    axis = Axis(-0.18, 9.18, figure.LEFT, SIZE[0] - figure.RIGHT)
    hits = near(image, color).any(0)
    return np.array([hits[round(axis.at(x)) - 2 : round(axis.at(x)) + 3].any() for x in range(10)])


def test_a_figure_has_the_size_of_its_panels():
    panel = Panel("title", "x", "y", [Line("a", [0, 1], [0, 1])])
    assert figure.figure([panel]).size == SIZE
    assert figure.figure([panel] * 3).size == (2 * SIZE[0], 2 * SIZE[1])
    assert figure.figure([panel] * 3, columns=3, size=(300, 200)).size == (900, 200)


def test_a_line_hits_the_pixels_of_its_data():
    image = figure.figure([Panel("", "", "", [Line("", [0, 10], [0.0, 1.0])])])
    x, mark = Axis(-0.2, 10.2, figure.LEFT, SIZE[0] - figure.RIGHT), near(image, COLORS[0])
    floor, top = SIZE[1] - figure.BOTTOM, 40
    y = Axis(0.0, 1.0, floor, top)
    for value in (1, 3, 5, 7, 9):
        rows = np.flatnonzero(mark[:, round(x.at(value))])
        assert abs(rows.mean() - y.at(value / 10)) <= 2


def test_nan_leaves_a_gap():
    y = [1.0, 2, 3, math.nan, math.nan, math.nan, 3, 2, 1, 1]
    assert drawn_columns(y).tolist() == [math.isfinite(v) for v in y]


def test_what_a_logarithmic_axis_cannot_show_is_a_gap():
    y = [1.0, 10, 100, 0, 0, 0, 100, 10, 1, 1]
    assert drawn_columns(y, log_y=True).tolist() == [v > 0 for v in y]


def test_one_point_between_gaps_is_a_dot():
    y = [math.nan] * 4 + [1.0] + [math.nan] * 5
    image = figure.figure([Panel("", "", "", [Line("", range(10), y)])])
    assert 10 < near(image, COLORS[0]).sum() < 80


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-7, 1e9])
def test_a_constant_series_is_a_level_line(value: float):
    image = figure.figure([Panel("", "", "", [Line("", range(5), [value] * 5)])])
    rows = np.flatnonzero(near(image, COLORS[0]).any(1))
    assert 1 <= len(rows) <= 4


@pytest.mark.parametrize("log", [False, True])
def test_a_series_without_numbers_draws_no_line(log: bool):
    image = figure.figure([Panel("", "", "", [Line("", range(5), [math.nan] * 5)], log_y=log)])
    assert not near(image, COLORS[0]).any()


def test_infinity_is_an_arrow_at_the_top():
    y = [1.0] * 9 + [math.inf]
    image = figure.figure([Panel("", "", "", [Line("", range(10), y)])])
    axis = Axis(-0.18, 9.18, figure.LEFT, SIZE[0] - figure.RIGHT)
    at = round(axis.at(9))
    assert near(image, COLORS[0])[40:60, at - 3 : at + 4].any()
    assert not near(image, COLORS[0])[70:, at - 3 : at + 4].any()


def test_bars_stand_on_zero_with_heights_like_their_data():
    image = figure.figure([Panel("", "", "", [Line("", [0, 1], [1.0, 2.0])], bars=True)])
    mark = near(image, COLORS[0])
    axis = Axis(-0.6, 1.6, figure.LEFT, SIZE[0] - figure.RIGHT)
    heights = [mark[:, round(axis.at(x))].sum() for x in (0, 1)]
    assert heights[1] == pytest.approx(2 * heights[0], abs=2)
    assert mark[SIZE[1] - figure.BOTTOM - 3, round(axis.at(0))]


def test_the_legend_lies_above_the_data_however_long_it_is():
    names = [f"a run with a rather long name, number {k}" for k in range(7)]
    lines = [Line(name, [0, 10], [1.0, 1.0], color=0) for name in names]
    rows = np.flatnonzero(near(figure.figure([Panel("", "", "", lines, hlines=(2.0,))]), COLORS[0]).any(1))
    legend, data = rows[rows < 130], rows[rows >= 130]
    assert len(legend) >= 3 and 1 <= len(data) <= 4


def test_a_band_is_lighter_than_its_line():
    line = Line("", [0, 1], [1.0, 1.0], low=[0.5, 0.5], high=[1.5, 1.5])
    area = plotting_area(figure.figure([Panel("", "", "", [line])]))
    tinted = (area[..., 2].astype(int) - area[..., 0] > 20).mean()
    assert 0.6 < tinted < 0.95


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 50, [0, 10, 20, 30, 40, 50]), (-1, 1, [-1, -0.5, 0, 0.5, 1])],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]):
    np.testing.assert_allclose(ticks(low, high), expected, atol=1e-12)


def test_ticks_of_a_logarithmic_axis_are_powers_of_ten():
    np.testing.assert_allclose(ticks(1e-3, 1e2, log=True), [1e-3, 1e-2, 1e-1, 1, 10, 100])
    np.testing.assert_allclose(ticks(0.05, 2, log=True), [0.05, 0.1, 0.2, 0.5, 1, 2])


@pytest.mark.parametrize(
    ("value", "step", "text"),
    [(0, 1, "0"), (0.25, 0.05, "0.25"), (2e-4, 1e-4, "2e-4"), (3e5, 1e5, "3e5"), (20, 10, "20"), (0.5, 0, "0.5")],
)
def test_tick_text_has_the_digits_of_the_step(value: float, step: float, text: str):
    assert tick_text(value, step) == text


def test_smoothing_keeps_a_constant_and_skips_nan():
    smoothed = plot.smooth([2.0, 2.0, math.nan, 2.0], 0.9)
    np.testing.assert_allclose(smoothed, [2.0, 2.0, math.nan, 2.0])
    assert plot.smooth([1.0, 5.0], 0.0) == [1.0, 5.0]
    assert plot.smooth([1.0, 2.0], 0.5)[1] == pytest.approx((0.25 * 1 + 0.5 * 2) / 0.75)


def test_smoothing_of_one_is_refused():
    with pytest.raises(ValueError, match=r"smoothing is 1, but must be at least 0 and below 1"):
        plot.smooth([1.0], 1)


@pytest.mark.parametrize("count", [1, 2, 30])
def test_curves_draw_a_run_of_any_length(count: int):
    assert plot.curves([record(k + 1) for k in range(count)]).size == (2 * SIZE[0], 2 * SIZE[1])


def test_curves_draw_records_with_missing_and_failed_values():
    broken = [{"update": 1}, record(2, reward_mean=math.nan, kl=None, per_step={}), record(3, held_out={})]
    assert plot.curves(broken).size == (2 * SIZE[0], 2 * SIZE[1])


def test_several_rewards_have_a_panel_each():
    rows = [record(k, rewards={"jpeg": 1.0, "align": 0.2}) for k in range(3)]
    assert plot.curves(rows, panels=("reward",)).size == (2 * SIZE[0], 2 * SIZE[1])


def test_the_per_step_numbers_are_the_mean_of_the_last_quarter():
    rows = [record(k, per_step={"steps": [0, 4], "clip_fraction": [k, 1.0]}) for k in range(8)]
    assert plot.per_step(rows, "clip_fraction") == ([0, 4], [6.5, 1.0])


def test_per_step_joins_steps_that_differ_from_update_to_update():
    rows = [
        record(1, per_step={"steps": [0, 1], "kl": [1.0, 2.0]}),
        record(2, per_step={"steps": [1, 2], "kl": [4.0, None]}),
    ]
    steps, values = plot.per_step(rows * 4, "kl")
    assert steps == [1, 2] or steps == [0, 1, 2]
    np.testing.assert_allclose(values, [1.0, 3.0, math.nan])


@pytest.mark.parametrize("draw", [plot.curves, lambda rows: plot.compare_runs({"cats": rows})])
def test_a_run_without_records_is_refused(draw):
    with pytest.raises(ValueError, match=r"0 records, but a curve needs at least 1"):
        draw([])


def test_an_unknown_panel_is_refused_by_name():
    with pytest.raises(ValueError, match=r"panel 'rewrd' is not one of reward, clip, kl, per_step"):
        plot.curves([record(1)], panels=("rewrd",))


def test_no_panels_are_refused():
    with pytest.raises(ValueError, match="0 panels"):
        figure.figure([])


def test_lines_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="line 'a' has 2 x values, but 1 in y"):
        Line("a", [0, 1], [0])


def test_compared_runs_keep_one_colour_each_in_every_panel():
    runs = {name: [record(k) for k in range(1, n)] for name, n in (("a", 9), ("b", 5))}
    image = plot.compare_runs(runs)
    assert image.size == (2 * SIZE[0], 3 * SIZE[1])
    for row in range(3):
        for col in range(2):
            cell = image.crop((col * SIZE[0], row * SIZE[1], (col + 1) * SIZE[0], (row + 1) * SIZE[1]))
            assert near(cell, COLORS[0]).any() and near(cell, COLORS[1]).any()


def test_credit_draws_an_infinite_native_weight_and_marks_untrained_steps():
    grey = "#f1f3f5"
    image = plot.credit([0.1, 0.5, math.inf], [0.3, 0.3, 0.0], [0.5, 0.2, 0.0], [0, 1])
    every = plot.credit([0.1, 0.5, 0.6], [0.3, 0.3, 0.3], [0.5, 0.2, 0.1], [0, 1, 2])
    assert image.size == every.size == (3 * 460, 340)
    assert near(image, grey, 1).sum() > 1000 > near(every, grey, 1).sum()
    assert near(image, COLORS[1])[60:76, 440 - figure.RIGHT : 442].any()


def test_credit_of_unequal_lengths_is_refused():
    with pytest.raises(ValueError, match="have 2, 1, 2 steps"):
        plot.credit([1.0, 1.0], [1.0], [1.0, 1.0], [0])


def plain(color: tuple[int, int, int], count: int = 4) -> np.ndarray:
    return np.full((count, 64, 64, 3), color, dtype=np.uint8)


def test_pictures_are_the_same_from_bytes_and_floats_numpy_and_torch():
    array = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    floats = torch.from_numpy(array).float() / 255
    for images in (array, array / 255.0, torch.from_numpy(array), floats.requires_grad_(), floats.double()):
        found = plot.to_pil_images(images)
        assert all(np.array_equal(np.asarray(p), a) for p, a in zip(found, array, strict=True))


def test_a_grid_shows_every_picture_in_its_place():
    colors = [(200, 30, 30), (30, 160, 30), (30, 30, 200)]
    image = plot.grid(np.concatenate([plain(c, 1) for c in colors]), None, columns=2, tile=160)
    assert image.size == (12 + 2 * 172, 12 + 2 * 172)
    centers = [(92, 92), (264, 92), (92, 264)]
    assert [image.getpixel(at) for at in centers] == colors
    assert image.getpixel((264, 264)) == (255, 255, 255)


def test_captions_make_room_below_the_pictures():
    images = plain((9, 9, 9))
    bare, named = plot.grid(images), plot.grid(images, ["a heart"] * 4)
    assert named.width == bare.width and named.height > bare.height


def test_pictures_that_are_not_square_keep_their_shape():
    image = plot.grid(np.zeros((1, 32, 64, 3)), tile=160)
    assert image.size == (24 + 160, 24 + 80)


@pytest.mark.parametrize("text", ["", "a heart", "word " * 80, "w" * 300])
def test_wrapped_text_fits_its_width_and_rows(text: str):
    rows = canvas.wrap(text, 11, 150)
    assert len(rows) <= 2 and all(canvas.text_width(row, 11) <= 150 for row in rows)


def test_wrapped_text_keeps_its_words_where_they_fit():
    assert (
        " ".join(canvas.wrap("two small pandas on a blue background", 11, 150))
        == "two small pandas on a blue background"
    )


def test_before_stands_left_of_after():
    image = plot.before_after(plain((200, 30, 30), 1), plain((30, 30, 200), 1), ["a heart"], columns=1)
    red, blue = (np.argwhere(near(image, color, 2))[:, 1] for color in ("#c81e1e", "#1e1ec8"))
    assert len(red) > 20000 and len(blue) > 20000 and red.max() < blue.min()


def test_a_higher_score_is_green_and_a_lower_one_is_not():
    before, after = plain((90, 90, 90), 1), plain((90, 90, 90), 1)
    up = plot.before_after(before, after, ["p"], [0.1], [0.9])
    down = plot.before_after(before, after, ["p"], [0.9], [0.1])
    assert near(up, canvas.UP).any() and not near(up, canvas.DOWN).any()
    assert near(down, canvas.DOWN).any() and not near(down, canvas.UP).any()


def test_scores_may_be_nan():
    image = plot.before_after(plain((9, 9, 9)), plain((9, 9, 9)), ["p"] * 4, [math.nan] * 4, [1.0] * 4)
    assert not near(image, canvas.UP).any()


def test_counts_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="3 captions for 4 images"):
        plot.grid(plain((0, 0, 0)), ["a"] * 3)
    with pytest.raises(ValueError, match="1 prompts for 4 images"):
        plot.before_after(plain((0, 0, 0)), plain((0, 0, 0)), ["a"])


@pytest.mark.parametrize("shape", [(64, 64, 3), (1, 3, 64, 64), (0, 64, 64, 3)])
def test_other_shapes_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="pictures are"):
        plot.grid(np.zeros(shape))


def test_whole_numbers_that_are_not_bytes_are_refused():
    with pytest.raises(ValueError, match="images are int64"):
        plot.grid(torch.zeros(1, 8, 8, 3, dtype=torch.int64))
