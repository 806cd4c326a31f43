"""The taste nodes in a real host: a CLIP Vision model as the features, files, and what is refused."""

import math
import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "support"))
import comfy_host

comfy_host.skip_without_host()
comfy_host.load_pack()

import comfy.clip_vision  # noqa: E402
import comfy_models  # noqa: E402

from comfyui_pcpo.plotting.grids import before_after  # noqa: E402
from comfyui_pcpo.taste.blind import blind_pairs  # noqa: E402
from comfyui_pcpo.taste.votes import VoteFolder  # noqa: E402

taste = comfy_host.pack_module("nodes.taste")
to_comfy_image = comfy_host.pack_module("nodes.images").to_comfy_image

pytestmark = pytest.mark.slow
TINY_CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "hidden_act": "quick_gelu", "image_size": 56,
    "patch_size": 14, "num_channels": 3, "projection_dim": 24, "layer_norm_eps": 1e-5,
}  # fmt: skip


def tiny_clip_vision():
    torch.manual_seed(0)
    model = comfy.clip_vision.ClipVisionModel(TINY_CLIP)
    for parameter in model.model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.fixture(scope="module")
def clip_vision():
    return tiny_clip_vision()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """uint8 (N, 48, 48, 3), plain colours with noise."""
    generator = torch.Generator().manual_seed(0)
    colors = torch.randint(0, 256, (90, 1, 1, 3), generator=generator)
    noise = torch.randint(-20, 21, (90, 48, 48, 3), generator=generator)
    return (colors + noise).clamp(0, 255).to(torch.uint8)


def redness(images: torch.Tensor) -> torch.Tensor:
    r, g, b = images.float().mean((1, 2)).unbind(1)
    return r - (g + b) / 2


def vote_in(name: str, images: torch.Tensor) -> None:
    folder = VoteFolder(comfy_host.pack_module("nodes.files").tastes_folder() / name)
    for group in images[:60].split(4):
        order = redness(group).argsort(descending=True).argsort().tolist()
        folder.add(group, "a prompt", order)


def test_a_taste_on_clip_vision_is_trained_saved_loaded_and_scores(clip_vision, images):
    vote_in("with-clip", images)
    reward, report = comfy_host.execute("PCPOTrainTaste", name="with-clip", clip_vision=clip_vision)
    assert report.startswith("15 votes: agrees with")
    (loaded,) = comfy_host.execute("PCPOLoadTaste", taste="with-clip", clip_vision=clip_vision)
    new = images[60:].float() / 255
    scores = loaded.rewards[0].score(new, [""] * len(new))
    torch.testing.assert_close(scores, reward.rewards[0].score(new, [""] * len(new)))
    assert torch.corrcoef(torch.stack([scores, redness(images[60:])]))[0, 1] > 0.7
    assert loaded.rewards[0].name == "with-clip"


def test_a_clip_vision_model_whose_weights_are_moved_scores_while_a_lora_is_trained(clip_vision, images):
    """A loader's weights are inference tensors, and training, in which rewards score, is outside of inference mode."""
    with torch.inference_mode():
        loaded = tiny_clip_vision()
    loaded.patcher.__class__ = comfy_models.Moved
    encode, before = taste.clip_vision_encoder(loaded).encode, comfy_models.Moved.moves
    with torch.inference_mode(False), torch.no_grad():
        for _ in range(2):
            features = encode(images[:2])
            torch.testing.assert_close(features, taste.clip_vision_encoder(clip_vision).encode(images[:2]))
            assert not features.is_inference()
            with torch.inference_mode():
                comfy_models.forget_loaded()
    assert comfy_models.Moved.moves - before >= 4


def test_loading_it_without_that_clip_vision_is_refused(images, clip_vision):
    vote_in("needs-clip", images)
    comfy_host.execute("PCPOTrainTaste", name="needs-clip", clip_vision=clip_vision)
    with pytest.raises(Exception, match=r"learned on the image features of ComfyUI's CLIP Vision, and emoji-align has"):
        comfy_host.execute("PCPOLoadTaste", taste="needs-clip")


def test_liked_and_disliked_folders_and_the_embedded_features(images, tmp_path):
    order = redness(images).argsort(descending=True)
    for name, rows in (("yes", order[:15]), ("no", order[-15:])):
        (tmp_path / name).mkdir()
        for row in rows.tolist():
            Image.fromarray(images[row].numpy()).save(tmp_path / name / f"{row}.png")
    reward, report = comfy_host.execute(
        "PCPOTrainTaste", name="folders", liked=str(tmp_path / "yes"), disliked=str(tmp_path / "no")
    )
    assert report.startswith("30 votes")
    node, given = comfy_host.load_pack()["PCPOTrainTaste"], {"liked": str(tmp_path / "yes"), "name": "folders"}
    before = node.fingerprint_inputs(**given)
    assert node.fingerprint_inputs(**given) == before
    picture = next((tmp_path / "yes").iterdir())
    os.utime(picture, ns=(0, picture.stat().st_mtime_ns + 1_000_000))  # replaced, which leaves the folder as it was
    assert node.fingerprint_inputs(**given) != before
    (tmp_path / "pairs.csv").write_text(f"better,worse\n{picture},{picture.parent / 'other.png'}\n")
    given = {"pairs": str(tmp_path / "pairs.csv"), "name": "folders"}
    before = node.fingerprint_inputs(**given)
    os.utime(picture, ns=(0, picture.stat().st_mtime_ns + 1_000_000))
    assert node.fingerprint_inputs(**given) != before
    scores = reward.rewards[0].score(images.float() / 255, [""] * len(images))
    assert scores[order[:15]].min() > scores[order[-15:]].max()


def test_missing_tastes_and_votes_are_refused_in_a_sentence():
    node = comfy_host.load_pack()["PCPOLoadTaste"]
    assert "has no taste named 'nothing'. Train it with Train Taste." in node.validate_inputs(taste="nothing")
    assert node.validate_inputs(taste=None) is True
    with pytest.raises(Exception, match="There is no preference to learn from in"):
        comfy_host.execute("PCPOTrainTaste", name="no-votes")


@pytest.mark.parametrize("name", ["", "..", "a/b", "con\n"])
def test_a_name_that_no_folder_can_have_is_refused(name):
    assert comfy_host.load_pack()["PCPOHumanVote"].validate_inputs(name=name) is not True


def test_a_taste_that_is_trained_again_is_loaded_again(images):
    vote_in("renewed", images)
    comfy_host.execute("PCPOTrainTaste", name="renewed")
    node, file = comfy_host.load_pack()["PCPOLoadTaste"], taste.taste_file("renewed")
    before = node.fingerprint_inputs(taste="renewed")
    assert before == node.fingerprint_inputs(taste="renewed")
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1_000_000))
    assert before != node.fingerprint_inputs(taste="renewed")
    assert math.isnan(node.fingerprint_inputs(taste=None))


def test_a_blind_comparison_goes_on_with_the_votes_that_it_has():
    a, b = torch.rand(2, 2, 8, 8, 3, generator=torch.Generator().manual_seed(0))
    given = {"question": "?", "votes": 0, "seed": 3}
    file = taste.blind_votes_file(a, b, "? 3")
    assert taste.kept_wins(file, 2) == []
    file.write_text('{"question": "?", "seed": 3, "wins": [1.0, 0.5]}')
    rate, *_ = comfy_host.execute("PCPOCompareBlind", a, b, **given)  # nobody is asked
    assert rate == 0.75
    rate, *_ = comfy_host.execute("PCPOCompareBlind", a, b, **{**given, "votes": 1})  # the first of the same order
    assert rate == 1
    assert taste.blind_votes_file(a, b, "? 4") != file != taste.blind_votes_file(b, a, "? 3")
    file.write_text('{"wins"')
    assert taste.kept_wins(file, 2) == []


def test_sides_of_a_blind_comparison_may_differ_in_channels_and_precision_and_are_named_in_the_grid():
    a, b = torch.rand(2, 2, 8, 8, 4, generator=torch.Generator().manual_seed(0))
    expected = taste.blind_votes_file(a[..., :3], b[..., :3], "? 3")
    expected.write_text('{"question": "?", "seed": 3, "wins": [1.0, 0.5]}')
    assert taste.blind_votes_file(a[..., :3], b, "? 3") == expected
    assert taste.blind_votes_file(a.double(), b[..., :3], "? 3") == expected
    *_, grid = comfy_host.execute("PCPOCompareBlind", a[..., :3], b, question="?", votes=0, seed=3)
    order = [pair.row for pair in blind_pairs(a, b, 0, 3)]
    drawn = before_after(a[order][..., :3], b[order][..., :3], ["B won", "tie"], titles=("A", "B"))
    assert torch.equal(grid, to_comfy_image(drawn))


def test_sides_of_a_blind_comparison_must_match():
    with pytest.raises(Exception, match="Side A has 2 images of 8 x 8, side B 3 of 8 x 8"):
        comfy_host.execute(
            "PCPOCompareBlind", torch.zeros(2, 8, 8, 3), torch.zeros(3, 8, 8, 3), question="?", votes=0, seed=0
        )
