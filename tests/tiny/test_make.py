"""The script that makes the embedded models runs from nothing to a model card, and its little world is consistent."""

import numpy as np
import pytest
import torch

from comfyui_pcpo.reward import load_reward
from comfyui_pcpo.tiny.captions import (
    COLORS,
    OBJECTS,
    Scene,
    caption,
    forget,
    held_out_prompts,
    is_held_out,
    parse,
)
from comfyui_pcpo.tiny.pipelines import MODELS
from tools.tiny.__main__ import main
from tools.tiny.card import polish_quality
from tools.tiny.codec import fit_linear
from tools.tiny.data import compatible, draw_pictures, labels
from tools.tiny.draw import draw, glyphs, random_scene
from tools.tiny.spoil import KINDS, spoil


@pytest.fixture(scope="module")
def drawn():
    return draw_pictures(300, seed=5)


def test_parse_reads_back_every_caption():
    rng = np.random.default_rng(0)
    for _ in range(300):
        scene = random_scene(rng)
        assert parse(caption(scene)) == scene
        assert parse(caption(forget(scene, False, True, False))) == forget(scene, False, True, False)


@pytest.mark.parametrize("text", ["", "a photo of a fox", "a fox a pig a frog", "two foxes and a pig"])
def test_parse_says_none_to_what_the_world_does_not_know(text):
    assert parse(text) is None


def test_training_never_shows_a_held_out_pair_and_some_pairs_are_held_out(drawn):
    assert not any(is_held_out(scene) for scene in drawn.scenes)
    held = {(parse(p).objects[0], parse(p).color) for p in held_out_prompts()}
    assert 8 <= len(held) <= 0.2 * len(OBJECTS) * len(COLORS)


def test_a_picture_needs_a_background():
    with pytest.raises(ValueError, match="Give a colour and a pattern"):
        draw(Scene(("fox",)), glyphs(), np.random.default_rng(0))


def test_a_caption_fits_its_own_picture_and_no_picture_of_something_else(drawn):
    scenes = drawn.scenes[:40]
    fits = compatible(labels(scenes), labels(scenes))
    assert fits.diagonal().all()
    assert not any(fits[i, j] for i in range(40) for j in range(40) if scenes[i] != scenes[j])
    vague = [forget(scene, False, False, False) for scene in scenes]
    assert compatible(labels(scenes), labels(vague)).sum() > 40


def test_the_linear_codec_loses_little_and_its_latents_have_unit_spread(drawn):
    images = drawn.images(torch.arange(300))
    codec = fit_linear(images)
    latents = codec.encode(images)
    assert latents.shape == (300, 16, 8, 8)
    assert latents.std().item() == pytest.approx(1, abs=0.05)
    error = (codec.decode(latents) - images).square().mean()
    assert 10 * torch.log10(4 / error) > 22


@pytest.mark.parametrize("kind", KINDS)
def test_polish_falls_with_everything_that_spoils_a_drawing(drawn, kind):
    torch.manual_seed(0)
    images = drawn.images(torch.arange(24))
    codec, polish = fit_linear(drawn.images(torch.arange(300))), load_reward("polish")

    def score(amount: float) -> float:
        copies = torch.stack([spoil(image, amount, kind, codec) for image in images])
        return polish.score((copies.permute(0, 2, 3, 1) + 1) / 2, [""] * 24).mean().item()

    assert score(0.0) > score(0.5) + 0.2 > score(1.0) + 0.4


def test_polish_explains_most_of_how_spoiled_unseen_drawings_are():
    assert polish_quality(MODELS, 200) > 0.8


@pytest.mark.slow
def test_every_stage_runs_and_the_card_is_written(tmp_path):
    models = tmp_path / "models"
    common = ["--work", str(tmp_path / "work"), "--models", str(models), "--pictures", "96", "--batch", "8"]
    for stage in ("text", "align", "polish", "decoder", "flow", "eps"):
        main([stage, *common, "--minutes", "0.005", "--threads", "1"])
    main(["decoder", *common, "--minutes", "0.001", "--threads", "1", "--go-on"])
    main(["eps", *common, "--minutes", "0.001", "--threads", "1", "--go-on"])
    main(["card", *common, "--images", str(tmp_path / "images"), "--every", "47", "--threads", "1"])
    text = (models / "README.md").read_text(encoding="utf-8")
    assert "| emoji-flow |" in text and "| emoji-eps |" in text
    assert (tmp_path / "images" / "emoji-flow.png").exists()


def test_the_glyph_stage_asks_for_a_font(tmp_path):
    with pytest.raises(SystemExit, match="--font is missing"):
        main(["glyphs", "--work", str(tmp_path)])
