"""Claims about image grids: sizes, places, captions of any text and length, scores, messages."""

import math
import time
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from comfyui_pcpo.plotting.grids import (
    CARD_GAP,
    GAP,
    HEAD,
    TITLE_ROW,
    before_after,
    grid,
    group_grid,
    text_width,
    to_pil_images,
)
from comfyui_pcpo.plotting.style import BETTER, WORSE
from comfyui_pcpo.plotting.text import shorten, wrap

MEASURE = partial(text_width, size=11)


def near(image: Image.Image, color: str, tolerance: int = 40) -> np.ndarray:
    """Where an image has a colour, (H, W)."""
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    return np.abs(np.asarray(image).astype(int) - wanted).max(-1) <= tolerance


def plain(color: tuple[int, int, int], count: int = 4) -> np.ndarray:
    return np.full((count, 64, 64, 3), color, dtype=np.uint8)


def test_images_are_the_same_from_bytes_and_floats_numpy_and_torch():
    array = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    floats = torch.from_numpy(array).float() / 255
    for images in (array, array / 255.0, torch.from_numpy(array), floats.requires_grad_(), floats.double()):
        converted = to_pil_images(images)
        assert all(np.array_equal(np.asarray(p), a) for p, a in zip(converted, array, strict=True))


def test_a_grid_shows_every_image_in_its_place():
    colors = [(200, 30, 30), (30, 160, 30), (30, 30, 200)]
    image = grid(np.concatenate([plain(c, 1) for c in colors]), None, columns=2, tile=160)
    assert image.size == (12 + 2 * 172, 12 + 2 * 172)
    centers = [(92, 92), (264, 92), (92, 264)]
    assert [image.getpixel(at) for at in centers] == colors
    assert image.getpixel((264, 264)) == (255, 255, 255)


def test_groups_have_their_prompt_once_and_at_most_eight_columns():
    images = plain((200, 30, 30), 24)
    one = grid(images[:12], ["0.50"] * 12, columns=8)
    sheet = group_grid(images, ["a fox", "a pig " * 200], ["0.50"] * 24)
    assert sheet.size == (one.width, 2 * (one.height + TITLE_ROW))
    for top in (0, one.height + TITLE_ROW):
        title = np.asarray(sheet.crop((0, top, sheet.width, top + TITLE_ROW)))
        assert title[:, : GAP - 2].min() == 255 and title.min() < 100
    with pytest.raises(ValueError, match="23 captions for 24 images"):
        group_grid(images, ["a fox", "a pig"], ["0.50"] * 23)
    with pytest.raises(ValueError, match="20 images of the groups for 24 images"):
        group_grid(images, ["a fox"] * 5, ["0.50"] * 24)


def test_captions_make_room_below_the_images():
    images = plain((9, 9, 9))
    bare, named = grid(images), grid(images, ["a heart"] * 4)
    assert named.width == bare.width and named.height > bare.height


def test_images_that_are_not_square_keep_their_shape():
    image = grid(np.zeros((1, 32, 64, 3)), tile=160)
    assert image.size == (24 + 160, 24 + 80)


@pytest.mark.parametrize("text", ["", "a heart", "word " * 80, "w" * 300, "i" * 3000, "a\n\nb " * 50])
def test_wrapped_text_fits_its_width_and_rows(text: str):
    rows = wrap(text, 150, MEASURE)
    assert len(rows) <= 2 and all(MEASURE(row) <= 150 for row in rows)


def test_wrapped_text_keeps_its_words_where_they_fit():
    text = "two small pandas on a blue background"
    assert " ".join(wrap(text, 150, MEASURE)) == text


def test_before_stands_left_of_after():
    image = before_after(plain((200, 30, 30), 1), plain((30, 30, 200), 1), ["a heart"], columns=1)
    red, blue = (np.argwhere(near(image, color, 2))[:, 1] for color in ("#c81e1e", "#1e1ec8"))
    assert len(red) > 20000 and len(blue) > 20000 and red.max() < blue.min()


def test_the_sides_are_named_above_each_column():
    grey = plain((90, 90, 90), 4)

    def heads(**titles: tuple[str, str]) -> np.ndarray:
        return np.asarray(before_after(grey, grey, ["p"] * 4, columns=2, **titles))[:HEAD]

    usual, letters, bare = heads(), heads(titles=("A", "B")), heads(titles=("", ""))
    assert np.array_equal(usual, heads(titles=("before", "after")))
    long, short = ((image != bare).any((0, 2)) for image in (usual, letters))  # where letters are, from left to right
    assert 0 < short.sum() < long.sum() / 3
    width = (len(short) - CARD_GAP) // 2  # of a column
    assert np.array_equal(short[:width], short[width : 2 * width])


@pytest.mark.parametrize(
    ("count", "columns"), [(1, 1), (2, 1), (3, 1), (4, 2), (6, 2), (8, 2), (9, 3), (12, 3), (18, 3)]
)
def test_pairs_may_make_a_sheet_near_to_a_square_without_a_hole(count: int, columns: int):
    grey = plain((90, 90, 90), count)
    square = before_after(grey, grey, ["p"] * count, columns="square")
    assert square.size == before_after(grey, grey, ["p"] * count, columns=columns).size
    assert count % columns == 0 and 0.4 < square.width / square.height < 1.6


def test_a_higher_score_is_green_and_a_lower_one_is_not():
    before, after = plain((90, 90, 90), 1), plain((90, 90, 90), 1)
    up = before_after(before, after, ["p"], ([0.1], [0.9]))
    down = before_after(before, after, ["p"], ([0.9], [0.1]))
    assert near(up, BETTER).any() and not near(up, WORSE).any()
    assert near(down, WORSE).any() and not near(down, BETTER).any()


def test_verdicts_are_a_green_tick_and_an_orange_cross():
    grey = plain((90, 90, 90), 1)
    image = before_after(grey, grey, ["p"], ([False], [True]), columns=1)
    ticks, crosses = (np.argwhere(near(image, color))[:, 1] for color in (BETTER, WORSE))
    assert len(ticks) and len(crosses) and crosses.max() < ticks.min()
    both_wrong = before_after(grey, grey, ["p"], ([False], [False]), columns=1)
    assert near(both_wrong, WORSE).any() and not near(both_wrong, BETTER).any()


def test_scores_may_be_nan():
    image = before_after(plain((9, 9, 9)), plain((9, 9, 9)), ["p"] * 4, ([math.nan] * 4, [1.0] * 4))
    assert not near(image, BETTER).any()


def test_counts_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="3 captions for 4 images"):
        grid(plain((0, 0, 0)), ["a"] * 3)
    with pytest.raises(ValueError, match="1 prompts for 4 images"):
        before_after(plain((0, 0, 0)), plain((0, 0, 0)), ["a"])


@pytest.mark.parametrize("shape", [(64, 64, 3), (1, 3, 64, 64), (0, 64, 64, 3)])
def test_other_shapes_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"must be \(B, H, W, 3\)"):
        grid(np.zeros(shape))


def test_whole_numbers_that_are_not_bytes_are_refused():
    with pytest.raises(ValueError, match="images are int64"):
        grid(torch.zeros(1, 8, 8, 3, dtype=torch.int64))


def test_counts_of_scores_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="1 after scores for 2 images"):
        before_after(plain((0, 0, 0), 2), plain((0, 0, 0), 2), ["a"] * 2, ([1.0] * 2, [1.0]))


def test_shortened_text_is_the_longest_that_fits():
    text = "a fox with a red scarf " * 20
    short = shorten(text, 150, MEASURE)
    assert short.endswith("\u2026") and text.startswith(short[:-1])
    longer = text[: len(short[:-1]) + 2].rstrip() + "\u2026"
    assert MEASURE(short) <= 150 < MEASURE(longer)


@pytest.mark.parametrize("prompt", ["a fox in the snow, " * 106, "w" * 2000, "i" * 2000])
def test_long_captions_take_no_time(prompt: str):
    images = plain((9, 9, 9), 8)
    grid(images[:1], ["a"])  # loads the font
    times = []
    for _ in range(3):
        start = time.process_time()
        grid(images, [prompt] * 8)
        times.append(time.process_time() - start)
    assert min(times) < 0.4  # 0.06 s on one idle core


TEXTS = ["caf\u00e9", "\u0444\u043e\u043a\u0441", "\u72d0\n\u72f8" * 40, "\U0001f98a", "\ud83d", "\x00\t$x^$", " \n "]


@pytest.mark.parametrize("caption", TEXTS, ids=range(len(TEXTS)))
def test_captions_may_be_of_any_text(caption: str):
    images = plain((9, 9, 9), 2)
    assert grid(images, [caption, "a"]).height > grid(images).height
    assert before_after(images, images, [caption, "a"]).width == before_after(images, images, ["a", "a"]).width


def test_accents_and_cyrillic_have_letters_of_their_own():
    missing = np.asarray(grid(plain((9, 9, 9), 1), ["\uffff"]))
    for letter in ("\u00e9", "\u0444", "\u03b1"):
        assert not np.array_equal(np.asarray(grid(plain((9, 9, 9), 1), [letter])), missing)
