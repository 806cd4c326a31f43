"""Rewards that read pixels, the resizes, and reading text: values known beforehand."""

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from comfyui_pcpo.reward import RewardError, load_reward
from comfyui_pcpo.reward.color import colorfulness
from comfyui_pcpo.reward.ocr import Ocr, levenshtein, plain, target_text, text_score
from comfyui_pcpo.reward.weights.preprocess import (
    crop_floor,
    crop_round,
    pad_square,
    pil_bicubic,
    shortest_side,
    two_pass_bicubic,
)
from tests.golden import reward_recipe as gold

torch.set_num_threads(1)


def test_jpeg_size_is_that_of_the_file_in_kilobytes():
    file = io.BytesIO()
    Image.fromarray(gold.array("small96")).save(file, format="JPEG", quality=95)
    size = len(file.getvalue()) / 1000
    assert load_reward("jpeg_incompressibility").score(gold.image("small96"), [""]).item() == pytest.approx(size)
    assert load_reward("jpeg_compressibility").score(gold.image("small96"), [""]).item() == pytest.approx(-size)


def test_grey_is_not_colourful_and_one_colour_counts_by_its_mean():
    plain_colors = torch.tensor([[0.5, 0.5, 0.5], [1.0, 0.0, 0.0]])[:, None, None].expand(2, 4, 4, 3)
    scores = load_reward("colorfulness").score(plain_colors, ["", ""])
    assert scores.tolist() == pytest.approx([0, 0.3 * 1.25**0.5])  # rg = 1, yb = 1/2
    halves = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])[None, None]
    assert colorfulness(halves).item() == pytest.approx(1 + 0.3 * 0.5)  # rg = +1, -1 and yb = 1/2


def test_redness_is_red_above_the_others():
    colors = torch.eye(3)[:, None, None].expand(3, 4, 4, 3)
    assert load_reward("redness").score(colors, [""] * 3).tolist() == [1, -0.5, -0.5]


@pytest.mark.parametrize("name", ["land300x451", "port337x225", "sq512", "small96"])
def test_two_passes_equal_pillow_to_one_grey_level_and_one_pass_does_not(name):
    images = torch.from_numpy(gold.array(name))[None]
    height, width = shortest_side(images).shape[1:3]
    wanted = pil_bicubic(images, height, width).int()
    assert (two_pass_bicubic(images, height, width).int() - wanted).abs().max() <= 1
    once = F.interpolate(images.permute(0, 3, 1, 2).float(), (height, width), mode="bicubic", antialias=True)
    assert (once.round().clamp(0, 255).permute(0, 2, 3, 1) - wanted).abs().max() > 1


def test_odd_margins_are_cut_one_pixel_apart():
    images = torch.from_numpy(np.tile(np.arange(227, dtype=np.uint8)[None, :, None], (224, 1, 3)))[None]
    assert torch.equal(crop_floor(images)[..., 1:], crop_round(images)[..., :-1])


@pytest.mark.parametrize("size", [(64, 64), (100, 224), (224, 100), (512, 3), (1, 700)])
def test_padding_keeps_the_whole_image_inside_black_bars(size):
    padded = pad_square(torch.full((1, *size, 3), 255, dtype=torch.uint8))
    assert padded.shape == (1, 3, 224, 224)
    white = (padded[0, 0] > 0).sum().item() / 224**2
    assert white == pytest.approx(min(size) / max(size), abs=0.01)


def test_the_target_stands_between_the_first_quotes():
    assert target_text('a sign "Hello World" and "no"') == "helloworld"
    assert target_text("a sign \u201cHi\u201d") == "hi"
    assert target_text("no quotes") is None and target_text('empty " "') is None


def test_text_scores_by_hand():
    assert text_score("cat", "thecatsat") == 1
    assert text_score("cat", "car") == pytest.approx(2 / 3)
    assert text_score("cat", "nothing at all") == 0
    assert levenshtein("kitten", "sitting") == 3 and levenshtein("", "ab") == 2
    assert plain(" A b\nC") == "abc"


def test_ocr_fails_a_prompt_without_text_and_keeps_what_it_read():
    reward = Ocr()
    reward.reader = lambda image: "Open 24 h"
    scores = reward.measure(torch.zeros(3, 8, 8, 3), ['"open 24 h"', '"shut"', "a shop"])
    assert scores.values[0] == 1 and scores.values[1] < 0.5 and scores.values[2].isnan()
    assert scores.extras["text"] == ["Open 24 h"] * 3
    reward.unload()
    assert reward.reader is None


def test_ocr_refuses_a_prompt_without_text_before_any_image():
    Ocr().require_prompts(['a sign "open"'])
    with pytest.raises(RewardError, match=r"the prompt 'a fox' has no text in double quotes, which ocr looks for"):
        Ocr().require_prompts(['a sign "open"', "a fox"])


def test_ocr_says_which_package_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(RewardError, match="pip install rapidocr"):
        Ocr().load()


def test_ocr_reads_a_drawn_word():
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    from PIL import ImageDraw, ImageFont

    canvas = Image.new("RGB", (400, 160), "white")
    ImageDraw.Draw(canvas).text((20, 50), "NASA 2049", fill=(200, 0, 0), font=ImageFont.load_default(60))
    image = torch.from_numpy(np.array(canvas))[None].float() / 255
    assert load_reward("ocr").score(image, ['a sign "NASA 2049"']).item() == 1
