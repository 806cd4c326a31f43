"""The script that makes the embedded models runs from nothing to a model card, and their world is consistent."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import tools.tiny.draw
import tools.tiny.latents
import tools.tiny.train_codec
from comfyui_pcpo.reward import load_reward
from comfyui_pcpo.tiny.align import Detection, Reading, load_image_encoder, read_images
from comfyui_pcpo.tiny.captions import (
    KINDS,
    MOST,
    OBJECTS,
    Scene,
    Thing,
    caption,
    held_out_pairs,
    held_out_prompts,
    is_held_out,
    is_valid,
    parse,
)
from comfyui_pcpo.tiny.judge import judge
from comfyui_pcpo.tiny.pipelines import MODELS
from comfyui_pcpo.tiny.polish import PolishNet
from comfyui_pcpo.tiny.tinyeval import suite, task_of
from tools.tiny.__main__ import main
from tools.tiny.codec import encode, make_autoencoder, principal_components, psnr, start_encoder
from tools.tiny.data import draw_scenes, random_scene, trained
from tools.tiny.degrade import DEGRADATIONS, degrade
from tools.tiny.draw import SINGLE, arrange, draw
from tools.tiny.fit import StageSettings
from tools.tiny.folders import Folders
from tools.tiny.labels import matches
from tools.tiny.latents import load_autoencoder
from tools.tiny.measure import suites, with_background
from tools.tiny.text import LENGTH
from tools.tiny.train_align import heat_targets
from tools.tiny.train_polish import polish_quality
from tools.tiny.wording import misread, sample_caption


@pytest.fixture(scope="module")
def drawings():
    return draw_scenes(300, seed=5)


def test_parse_reads_back_every_caption_and_each_fits_the_text_encoder():
    rng = np.random.default_rng(0)
    for _ in range(500):
        scene = random_scene(rng)
        for said in (scene, sample_caption(scene, rng)):
            assert parse(caption(said)) == said
            assert len(caption(said).split()) <= LENGTH - 2


@pytest.mark.parametrize(
    "text",
    [
        "", "a photo of a fox", "a fox a pig a frog", "a square", "a red fox", "a fox and a fox",
        "three foxes and two pigs", "two foxes left of a pig", "a red square on a red background",
        "a fox on a striped background", "foxes", "a foxes", "two fox", "two red square", "a star left of two pigs",
    ],
)  # fmt: skip
def test_parse_says_none_to_what_the_world_does_not_have(text):
    assert parse(text) is None


def test_a_scene_has_things_and_exactly_the_shapes_have_a_colour():
    assert is_valid(Scene((Thing("circle", color="red"),)))
    assert not any(is_valid(Scene(things)) for things in [(), (Thing("circle"),), (Thing("fox", color="red"),)])


def test_training_never_shows_a_held_out_combination_and_each_family_has_some(drawings):
    assert not any(is_held_out(scene) for scene in drawings.scenes)
    assert all(is_held_out(parse(prompt)) for prompt in (*held_out_prompts(), *held_out_pairs()))
    assert any(
        is_held_out(Scene((Thing(kind.split()[1], 1, None, kind.split()[0]),))) for kind in KINDS[len(OBJECTS) :]
    )
    assert all(len(prompts) >= 50 for prompts in suites().values())


def test_an_image_needs_a_background():
    with pytest.raises(ValueError, match="Give a colour and a pattern"):
        draw(Scene((Thing("fox"),)), np.random.default_rng(0))


def test_objects_are_where_the_relation_puts_them_and_apart(drawings):
    rng = np.random.default_rng(0)
    first, second = arrange(parse("a fox left of a panda"), rng)
    assert (first.kind, second.kind) == ("fox", "panda") and second.x - first.x > 40 > abs(second.y - first.y)
    first, second = arrange(parse("a star above a house"), rng)
    assert (first.kind, second.kind) == ("star", "house") and second.y - first.y > 40 > abs(second.x - first.x)
    assert [box.width for box in arrange(parse("a fox"), rng)] == [SINGLE["big"]]
    beside = [arrange(parse("a fox and a panda"), rng) for _ in range(20)]
    assert all(b.x - a.x > 40 > abs(b.y - a.y) for a, b in beside)
    assert all(a.kind == "fox" and b.kind == "panda" for a, b in beside)
    for scene, boxes in zip(drawings.scenes, drawings.boxes, strict=True):
        assert len(boxes) == scene.total <= MOST
        assert all(np.hypot(a.x - b.x, a.y - b.y) >= 48 for a in boxes for b in boxes if a is not b)


def test_a_prompt_is_drawn_as_training_draws_what_it_leaves_open():
    rng = np.random.default_rng(0)
    for _ in range(20):
        (fox,) = arrange(with_background(parse("a fox"), rng), rng)
        assert fox.width == SINGLE["big"]
        first, second = arrange(with_background(parse("a fox and a panda"), rng), rng)
        assert abs(second.x - first.x) > 40 > abs(second.y - first.y)
        assert with_background(parse("a red circle"), rng).color != "red"


def test_a_caption_fits_its_own_image_and_no_image_of_something_else(drawings):
    rng, scenes = np.random.default_rng(0), drawings.scenes[:40]
    fits = matches(scenes, scenes)
    assert fits.diagonal().all()
    assert not any(fits[i, j] for i in range(40) for j in range(40) if scenes[i] != scenes[j])
    assert matches(scenes, [sample_caption(scene, rng) for scene in scenes]).diagonal().all()
    swapped = [replace(scene, things=scene.things[::-1]) for scene in scenes if scene.relation]
    assert not matches([scene for scene in scenes if scene.relation], swapped).diagonal().any()


def test_careless_captions_are_wrong_for_two_in_five_images_of_the_hard_prompts_only():
    rng, wrong = np.random.default_rng(0), {}
    while len(wrong.get("attribute binding", ())) < 100:
        scene = random_scene(rng)
        said = misread(sample_caption(scene, rng), rng)
        if trained(scene) and (len(said.things) == 1 or said.total == 2):
            kind = f"{said.total} equal" if len(said.things) == 1 else task_of(said)
            wrong.setdefault(kind, []).append(not matches([scene], [said]).item())
    shares = {kind: sum(found) / len(found) for kind, found in wrong.items()}
    assert shares["1 equal"] == shares["2 equal"] == shares["3 equal"] == 0
    assert all(0.3 < shares[kind] < 0.5 for kind in ("4 equal", "two objects", "attribute binding", "position"))


def test_a_caption_leaves_out_only_what_its_drawing_would_be_without(drawings):
    rng = np.random.default_rng(0)
    for scene in drawings.scenes:
        said = sample_caption(scene, rng)
        assert said.things[0].size or scene.things[0].size != "small"
        assert said.relation or scene.relation != "above"


def test_the_encoder_starts_as_principal_components_of_unit_spread(drawings):
    images = drawings.images(torch.arange(60))
    down, bias = principal_components(images)
    vae = make_autoencoder()
    start_encoder(vae, down, bias)
    patches = torch.nn.functional.unfold(images * 0.5 + 0.5, 8, stride=8)
    wanted = (down @ patches + bias[:, None]).unflatten(2, (16, 16))
    with torch.no_grad():
        latents = vae.encode(images).latents
        torch.testing.assert_close(encode(vae, images), latents)
    torch.testing.assert_close(latents, wanted, rtol=1e-4, atol=1e-4)
    assert latents.square().mean().item() == pytest.approx(1, abs=0.05)


def test_the_autoencoder_keeps_drawings():
    vae, images = load_autoencoder(Folders(MODELS)), draw_scenes(24, seed=6).images(torch.arange(24))
    assert psnr(vae.decode(vae.encode(images).latents).sample, images) > 28


def test_latents_are_encoded_anew_where_drawings_change(tmp_path, monkeypatch):
    monkeypatch.setattr(tools.tiny.latents, "SHARD", 4)
    settings = StageSettings(tmp_path, images=4)
    for code in (1, 1, 2):
        monkeypatch.setattr(tools.tiny.latents, "drawing_code", lambda code=code: code)
        assert len(tools.tiny.latents.latents(settings, Folders(MODELS)).scenes) == 4
    assert sorted(path.name[-8:] for path in tmp_path.iterdir()) == ["00000001", "00000002"]


def test_other_glyphs_are_other_drawings(tmp_path, monkeypatch):
    before = tools.tiny.latents.drawing_code()
    sheet = tmp_path / "glyphs.png"
    sheet.write_bytes(tools.tiny.draw.SHEET.read_bytes() + b"0")
    monkeypatch.setattr(tools.tiny.draw, "SHEET", sheet)
    assert tools.tiny.latents.drawing_code() != before


class Interruption:
    """Does something while it is being written to a file; read back, it is a text."""

    def __init__(self, act):
        self.act = act

    def __reduce__(self):
        self.act()
        return str, ("a scene",)


def write_drawings(folder, monkeypatch, act):
    """Encode and write one shard; `act` is called in the middle of writing."""
    encoded = tools.tiny.latents.Latents(torch.ones(1), [Interruption(act)])
    monkeypatch.setattr(tools.tiny.latents, "encode_drawings", lambda *_: encoded)
    return tools.tiny.latents._part(None, folder, 0)


def test_latents_that_were_interrupted_are_encoded_again(tmp_path, monkeypatch):
    def interrupt():
        assert not (tmp_path / "0.pt").exists()  # nor would another stage read it
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_drawings(tmp_path, monkeypatch, interrupt)
    assert list(tmp_path.iterdir()) == []
    assert write_drawings(tmp_path, monkeypatch, lambda: None).scenes == ["a scene"]


def test_two_stages_may_encode_the_same_drawings(tmp_path, monkeypatch):
    def other_stage():
        with monkeypatch.context() as context:
            context.setattr(tools.tiny.latents.os, "getpid", lambda: -1)
            write_drawings(tmp_path, monkeypatch, lambda: None)

    assert write_drawings(tmp_path, monkeypatch, other_stage).values == 1
    assert [path.name for path in tmp_path.iterdir()] == ["0.pt"]


def test_heat_is_one_at_each_centre_and_nowhere_else(drawings):
    heat = heat_targets(drawings.boxes[:50])
    assert (heat == 1).sum() == sum(len(boxes) for boxes in drawings.boxes[:50])
    assert heat.max() == 1 and heat.min() >= 0


def test_the_judge_asks_for_kinds_numbers_and_places():
    def reading(*kinds: str) -> Reading:
        return Reading(tuple(Detection(kind, 30 + 60 * n, 64, 56, 1) for n, kind in enumerate(kinds)), "red", "plain")

    assert all(judge(reading("fox", "panda"), parse("a fox left of a panda on a plain red background")).values())
    assert judge(reading("panda", "fox"), parse("a fox left of a panda")) == {
        "object": True, "count": True, "relation": False,
    }  # fmt: skip
    assert judge(reading("fox", "fox"), parse("a fox on a blue background")) == {
        "object": True, "count": False, "background": False,
    }  # fmt: skip


def test_the_reader_reads_drawings_that_it_never_saw():
    drawings = draw_scenes(100, seed=7, allowed=lambda scene: True)
    readings = read_images(load_image_encoder(), drawings.images(torch.arange(100)))
    right = [all(judge(reading, scene).values()) for reading, scene in zip(readings, drawings.scenes, strict=True)]
    assert sum(right) >= 97


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_polish_falls_with_every_degradation_of_a_drawing(drawings, kind):
    torch.manual_seed(0)
    images, vae, polish = drawings.images(torch.arange(24)), load_autoencoder(Folders(MODELS)), load_reward("polish")

    def score(amount: float) -> float:
        copies = torch.stack([degrade(image, amount, kind, vae) for image in images])
        return polish.score((copies.permute(0, 2, 3, 1) + 1) / 2, [""] * 24).mean().item()

    assert score(0.0) > score(0.5) + 0.2 > score(1.0) + 0.4


def test_polish_explains_most_of_how_degraded_unseen_drawings_are():
    assert polish_quality(Folders(MODELS), 100) > 0.8


@pytest.mark.slow
def test_every_stage_runs_and_the_card_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(tools.tiny.latents, "SHARD", 16)
    monkeypatch.setattr(tools.tiny.train_codec, "CODEC_DRAWINGS", 16)
    models = tmp_path / "models"
    common = ["--work", str(tmp_path), "--models", str(models), "--images", "16", "--batch", "8", "--threads", "1"]
    for stage in ("codec", "text", "align", "polish", "flow", "eps"):
        main([stage, *common, "--minutes", "0.005"])
    main(["flow", *common, "--minutes", "0.001", "--resume"])
    main(["decoder", *common, "--minutes", "0.001"])
    monkeypatch.setattr("tools.tiny.card.suites", lambda: {"equal": held_out_pairs()[:2]})
    monkeypatch.setattr("tools.tiny.card.suite_prompts", lambda: [prompts[0] for prompts in suite().values()])
    monkeypatch.setattr("tools.tiny.card.SAMPLE_PROMPTS", ("a fox", "two frogs"))
    main(["card", *common])
    text = (models / "README.md").read_text(encoding="utf-8")
    assert "| emoji-flow, 12 steps, guidance 1 |" in text and "| emoji-eps, 20 steps, guidance 3 |" in text
    assert "| `flow` | `--batch 64 " in text and "R squared of" in text
    assert f"| `emoji-polish` | {sum(p.numel() for p in PolishNet().parameters()):,} |" in text
    assert "| emoji-flow, flow_sde |" in text and "| emoji-eps, ddim |" in text
    assert (tmp_path / "emoji-flow.png").exists()


def test_the_glyph_stage_asks_for_a_font(tmp_path):
    with pytest.raises(SystemExit, match="--font is missing"):
        main(["glyphs", "--work", str(tmp_path)])
