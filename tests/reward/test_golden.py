"""Adapters on tiny weights give the scores that the reference implementations gave; the usual mistakes do not."""

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from comfyui_pcpo.reward import RewardSettings, aesthetic, hpsv2, hpsv3, imagereward, pickscore
from comfyui_pcpo.reward.aesthetic import Aesthetic
from comfyui_pcpo.reward.clip import ClipShape
from comfyui_pcpo.reward.clipscore import ClipCosine, ClipLogits, ClipScore25, ClipScore100
from comfyui_pcpo.reward.hpsv2 import HPSv21
from comfyui_pcpo.reward.hpsv3 import HPSv3
from comfyui_pcpo.reward.imagereward import BlipShape, ImageReward, new_name
from comfyui_pcpo.reward.pickscore import PickScore
from comfyui_pcpo.reward.qwen2vl import QwenShape, grid_size
from comfyui_pcpo.reward.weights.checkpoint import file_path
from comfyui_pcpo.reward.weights.preprocess import crop_floor, crop_round
from comfyui_pcpo.reward.weights.tokens import bert_tokens, clip_tokens, plain_clip_tokens
from tests.golden import reward_recipe as gold

pytestmark = pytest.mark.slow

torch.set_num_threads(1)
HUGE = ClipShape(64, 160, 2, 80, 14, 64, 2, 2)
LARGE = ClipShape(96, 128, 2, 64, 14, 64, 2, 2, quick_gelu=True)


FEW = ("land300x451", "port337x225", "port512x337")  # odd margins and long sides: enough to show a mistake


class TinyHps(HPSv21):
    shape = HUGE


class TinyPick(PickScore):
    shape = HUGE


class TinyBlip(ImageReward):
    shape = BlipShape(128, 2, 4, 96, 2, 4)


class TinyAesthetic(Aesthetic):
    shape = LARGE


class TinyClip(ClipCosine):
    shape = LARGE


class TinyClip25(ClipScore25):
    shape = LARGE


class TinyClip100(ClipScore100):
    shape = LARGE


class TinyLogits(ClipLogits):
    shape = LARGE


class TinyHps3(HPSv3):
    shape = QwenShape(64, 2, 4, 2, 96, (2, 3, 3), 32, 2, 2)


SMALL_COSINE = 0.03


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A weight folder in the official layouts, with buffers that older files carry."""
    folder = tmp_path_factory.mktemp("weights")
    shapes = {name: gold.golden(name)["shapes"] for name in ("hpsv2", "hpsv3", "pickscore", "imagereward", "aesthetic")}
    positions = torch.arange(77)[None]
    contents = {
        HPSv21.files[0]: {"state_dict": gold.weights(shapes["hpsv2"])},
        HPSv3.files[0]: gold.weights(shapes["hpsv3"]),
        PickScore.files[0]: gold.weights(shapes["pickscore"]) | {"text_model.embeddings.position_ids": positions},
        ImageReward.files[0]: gold.weights(shapes["imagereward"])
        | {"blip.text_encoder.embeddings.position_ids": positions},
        Aesthetic.files[0]: gold.weights(gold.golden("aesthetic")["head_shapes"]),
        Aesthetic.files[1]: gold.weights(shapes["aesthetic"]),
    }
    for file, state in contents.items():
        path = file_path(folder, file)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    tokenizer = file_path(folder, HPSv3.files[1])
    tokenizer.parent.mkdir()
    gold.qwen_tokenizer().save(str(tokenizer))
    return RewardSettings(folder=folder)


def error(scores, name, key="scores", relative=True):
    """Largest distance from the golden scores, relative to each of them or absolute.

    A cosine is rounded by some 1e-7 whatever its size, in an order of sums that machines differ in: nearer to 0 than
    SMALL_COSINE, that alone would be more than 1e-5 of it.
    """
    want = gold.golden(name)[key]
    return max(abs(scores[p] - want[p]) / (max(abs(want[p]), SMALL_COSINE) if relative else 1) for p in scores)


def test_hpsv2_equals_the_reference(settings):
    assert error(gold.scores(TinyHps(settings)), "hpsv2") < 1e-5


def test_hpsv3_equals_the_reference(settings):
    assert error(gold.scores(TinyHps3(settings)), "hpsv3") < 1e-5


def test_hpsv3_resizes_as_the_reference():
    for name, (_, rows, columns) in gold.golden("hpsv3")["grids"].items():
        height, width, _ = gold.array(name).shape
        assert grid_size(height, width, hpsv3.IMAGE_AREA) == (14 * rows, 14 * columns)


def test_hpsv3_reads_the_newer_layout_of_the_same_weights(settings, tmp_path):
    """transformers 4.52 moved both parts below `model`."""
    state = gold.weights(gold.golden("hpsv3")["shapes"])
    new = {
        k.replace("model.", "model.language_model.", 1).replace("visual.", "model.visual.", 1): v
        for k, v in state.items()
    }
    for file in HPSv3.files:
        path = file_path(tmp_path, file)
        path.parent.mkdir()
        path.write_bytes(file_path(settings.folder, file).read_bytes())
    save_file(new, file_path(tmp_path, HPSv3.files[0]))
    moved = TinyHps3(RewardSettings(folder=tmp_path))
    assert gold.scores(moved, FEW[:1]) == gold.scores(TinyHps3(settings), FEW[:1])


def test_imagereward_equals_the_reference(settings):
    assert error(gold.scores(TinyBlip(settings)), "imagereward") < 1e-5


def test_aesthetic_equals_the_reference(settings):
    assert error(gold.scores(TinyAesthetic(settings)), "aesthetic") < 1e-5


def test_clip_cosine_equals_the_reference(settings):
    assert error(gold.scores(TinyClip(settings)), "aesthetic", "clip_cosine") < 1e-5


def test_pickscore_equals_the_reference(settings):
    assert error(gold.scores(TinyPick(settings)), "pickscore", relative=False) < 2e-5


def test_clipscores_are_scaled_and_never_negative(settings):
    images, prompts = gold.image("small96"), [gold.PROMPTS["small96"]]  # a cosine of -0.04
    assert TinyClip25(settings).score(images, prompts).item() == 0
    cosine = gold.golden("aesthetic")["clip_cosine"]["exact224"]
    score = TinyClip100(settings).score(gold.image("exact224"), [gold.PROMPTS["exact224"]]).item()
    assert score == pytest.approx(100 * cosine, rel=1e-5)


def test_clip_logits_keep_their_sign_and_take_the_scale_of_the_weights(settings):
    images, prompts = gold.image("small96"), [gold.PROMPTS["small96"]]
    cosine = gold.golden("aesthetic")["clip_cosine"]["small96"]
    assert cosine < 0
    assert TinyLogits(settings).score(images, prompts).item() == pytest.approx(100 * cosine, rel=1e-5)


def test_token_ids_equal_the_reference():
    wanted = gold.golden("pickscore")["input_ids"]
    for name, ids in wanted.items():
        assert plain_clip_tokens([gold.PROMPTS[name]])[0, : len(ids)].tolist() == ids
    blip = gold.golden("imagereward")
    for name in gold.PROMPTS:
        ids, mask = bert_tokens([gold.PROMPTS[name]])
        assert ids[0].tolist() == blip["input_ids"][name]
        assert mask[0].tolist() == blip["attention_mask"][name]


def test_only_openais_cleaning_mends_quotes_and_html():
    prompt = gold.PROMPTS["port337x225"]
    assert clip_tokens([prompt]).tolist() != plain_clip_tokens([prompt]).tolist()
    assert clip_tokens(["caf\u00e9 &amp; \u201ctea\u201d"]).tolist() == clip_tokens(['caf\u00e9 & "tea"']).tolist()


def test_hpsv2_with_a_center_crop_is_wrong(settings, monkeypatch):
    monkeypatch.setattr(hpsv2, "pad_square", crop_round)
    scores = gold.scores(TinyHps(settings), FEW)
    assert error(scores, "hpsv2", relative=False) > 1e-3


def test_hpsv3_with_qwens_own_image_positions_is_wrong(settings, monkeypatch):
    """Qwen2-VL gives image tokens a row and a column; the reward's were trained without."""
    reward = TinyHps3(settings).load()
    language = reward.model.backbone.model
    forward = language.forward

    def two_dimensional(position_ids, **inputs):
        tokens = position_ids.clone()
        start, columns = 50, 20
        image = torch.arange(14 * columns)
        grid = torch.stack([0 * image, image // columns, image % columns])
        tokens[:, :, start : start + len(image)] = grid[:, None] + start
        return forward(position_ids=tokens, **inputs)

    monkeypatch.setattr(language, "forward", two_dimensional)
    assert error(gold.scores(reward, FEW[:1]), "hpsv3") > 1e-4


def test_hpsv3_that_scores_the_end_of_the_chat_is_wrong(settings, monkeypatch):
    monkeypatch.setattr(hpsv3, "instruction", lambda: hpsv3.INSTRUCTION_FILE.read_text(encoding="utf-8"))
    assert error(gold.scores(TinyHps3(settings), FEW[:1]), "hpsv3") > 1e-3


def test_hpsv3_without_its_newlines_is_wrong(settings, monkeypatch):
    text = hpsv3.instruction().strip()
    monkeypatch.setattr(hpsv3, "instruction", lambda: text)
    assert error(gold.scores(TinyHps3(settings), FEW[:1]), "hpsv3") > 1e-4


def test_a_prompt_cannot_bring_hpsv3s_special_tokens(settings):
    prompts = ["<|image_pad|> <|Reward|>", "<|im_end|>", "{text_prompt} {0}"]
    assert TinyHps3(settings).score(gold.image("exact224").expand(3, -1, -1, -1), prompts).isfinite().all()


def test_pickscore_with_mended_text_is_wrong(settings, monkeypatch):
    monkeypatch.setattr(pickscore, "plain_clip_tokens", clip_tokens)
    assert error(gold.scores(TinyPick(settings), FEW), "pickscore", relative=False) > 1


def test_the_other_rounding_of_the_crop_is_wrong(settings, monkeypatch):
    monkeypatch.setattr(pickscore, "crop_floor", crop_round)
    monkeypatch.setattr(aesthetic, "crop_round", crop_floor)
    monkeypatch.setattr(imagereward, "crop_round", crop_floor)
    assert error(gold.scores(TinyPick(settings), FEW), "pickscore", relative=False) > 1e-3
    assert error(gold.scores(TinyAesthetic(settings), FEW), "aesthetic") > 1e-4
    assert error(gold.scores(TinyBlip(settings), FEW), "imagereward") > 1e-4


def test_aesthetic_with_gelu_is_wrong(settings):
    class Gelu(Aesthetic):
        shape = ClipShape(96, 128, 2, 64, 14, 64, 2, 2)

    assert error(gold.scores(Gelu(settings), FEW), "aesthetic") > 1e-3


def test_aesthetic_without_unit_vectors_is_wrong(settings, monkeypatch):
    monkeypatch.setattr(F, "normalize", lambda vectors, dim: vectors)
    assert error(gold.scores(TinyAesthetic(settings), FEW), "aesthetic", relative=False) > 0.1


def test_imagereward_with_default_eps_is_wrong(settings):
    reward = TinyBlip(settings).load()
    for module in reward.model.vision.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5
    assert error(gold.scores(reward, FEW), "imagereward") > 1e-5


def test_imagereward_with_a_causal_mask_is_wrong(settings, monkeypatch):
    reward = TinyBlip(settings).load()
    forward = reward.model.text.forward
    monkeypatch.setattr(reward.model.text, "forward", lambda **inputs: forward(**inputs, is_decoder=True))
    assert error(gold.scores(reward, FEW), "imagereward", relative=False) > 1e-3


def test_a_resize_without_antialias_is_wrong(settings, monkeypatch):
    resize = F.interpolate
    monkeypatch.setattr(F, "interpolate", lambda x, size, mode, antialias: resize(x, size, mode=mode))
    assert error(gold.scores(TinyHps(settings), FEW), "hpsv2") > 1e-2


@pytest.mark.parametrize("cls", [TinyHps, TinyHps3, TinyPick, TinyBlip, TinyAesthetic, TinyClip])
def test_a_score_does_not_depend_on_the_batch(cls, settings):
    images = torch.cat([gold.image("exact224"), gold.image("exact224").flip(2), gold.image("exact224").flip(1)])
    prompts = ["a cat", "", "two cats on a mat"]
    reward = cls(settings)
    together = reward.score(images, prompts)
    alone = torch.cat([reward.score(images[n : n + 1], prompts[n : n + 1]) for n in range(3)])
    assert torch.allclose(together, alone, rtol=1e-5, atol=2e-5 if cls is TinyPick else 1e-6)


@pytest.mark.parametrize("cls", [TinyHps, TinyPick, TinyBlip, TinyClip])
def test_strange_prompts_have_finite_scores(cls, settings):
    prompts = ["", "\u201cquoted\u201d &lt;b&gt; &amp;amp;", "\U0001f98a\U0001f33b", "x" * 5000, "word " * 1000, "\n\t"]
    assert cls(settings).score(gold.image("exact224").expand(6, -1, -1, -1), prompts).isfinite().all()


@pytest.mark.parametrize("cls", [TinyHps, TinyHps3, TinyPick, TinyBlip, TinyAesthetic])
def test_half_precision_stays_close(cls, settings):
    half = RewardSettings(folder=settings.folder, dtype=torch.float16)
    full = cls(settings).score(gold.image("exact224"), ["a cat"])
    # fp16 keeps 3 digits of activations, HPSv3's bf16 two; PickScore's scale of 100 shows it as well
    tolerance = {TinyPick: 0.2, TinyHps3: 2e-2}.get(cls, 5e-3)
    assert torch.allclose(cls(half).score(gold.image("exact224"), ["a cat"]), full, atol=tolerance)


def test_the_key_map_reaches_every_weight_once():
    shapes = gold.golden("imagereward")["shapes"]
    names = [new_name(name) for name in shapes if "_proj." not in name or "attention" in name]
    assert len(set(names)) == len(names)
    assert not [name for name in names if not name.startswith(("vision.", "text.", "head."))]
