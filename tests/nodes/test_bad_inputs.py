"""Bad inputs of every node: refused in a sentence, before any work, with nothing changed on disk."""

import copy
import os
import re
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "support"))
import comfy_host

comfy_host.skip_without_host()

import torch  # noqa: E402

comfy_host.load_pack()
import comfy.model_management as mm  # noqa: E402
import comfy_models  # noqa: E402
from comfy_api.latest import io  # noqa: E402

from comfyui_pcpo.method.guidance import ImplicitReward  # noqa: E402
from comfyui_pcpo.reward import Reward, RewardError, load_reward  # noqa: E402
from comfyui_pcpo.reward.service.remote import Remote  # noqa: E402
from comfyui_pcpo.reward.service.wire import Peer  # noqa: E402

pytestmark = pytest.mark.slow

call = comfy_host.execute
files = comfy_host.pack_module("nodes.files")
types = comfy_host.pack_module("nodes.types")
syntax = comfy_host.pack_module("nodes.host.prompt_syntax")
folders = comfy_host.pack_module("trainer.runs.folder")
ConfigError = comfy_host.pack_module("trainer.config.schema").ConfigError
NAN, INFINITE = float("nan"), float("inf")
SECONDS = 20.0


@pytest.fixture(scope="module")
def flow():
    return comfy_models.Tiny("emoji-flow")


@pytest.fixture(scope="module")
def eps():
    return comfy_models.Tiny("emoji-eps")


def snapshot():
    folder = files.runs_folder()
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")} if folder.is_dir() else {}


def refused(work, words):
    """`work` ends in one sentence with `words`, in time, and changes nothing on disk."""
    before, start = snapshot(), time.monotonic()
    with pytest.raises((ConfigError, RewardError)) as raised:
        work()
    assert time.monotonic() - start < SECONDS
    message = str(raised.value)
    assert re.search(words, message), message
    assert "Traceback" not in message and len(message) < 700 and snapshot() == before


def inputs_of(flow, node):
    """Inputs with which a node runs."""
    images = torch.rand(2, 16, 16, 3)
    conditionings = {"positive": flow.positive, "negative": flow.negative}
    sampling = {"model": flow.model, **conditionings, "latent_image": flow.latent(1)}
    aligned = types.AlignedModel(comfy_models.lora_on(flow, 1), ImplicitReward(1.0))
    return {
        "PCPOLoadTinyModel": {"model": "emoji-flow"},
        "PCPOPrompts": {"clip": flow.clip, "text": "a fox", "negative": ""},
        "PCPOLoadReward": {"reward": "colorfulness", "dtype": "float32"},
        "PCPOCombineRewards": {"reward_a": flow.reward, "weight_a": 1.0, "weight_b": 1.0, "standardise": True,
                               "reward_b": call("PCPOLoadReward", "redness")[0]},
        "PCPOScoreImages": {"images": images, "reward": flow.reward, "prompt": "", "keep_best": 0},
        "PCPOTrainLoRA": {"model": flow.model, "vae": flow.vae, "prompts": flow.prompts, "reward": flow.reward,
                          "latent_image": flow.latent(1), "name": "bad", "updates": 1, "prompts_per_update": 1,
                          "group_size": 2, "steps": 2, "learning_rate": 1e-3, "rank": 2},
        "PCPOPlotRun": {"run": types.RunReference(Path("nowhere")), "smoothing": 0.5, "panels": "all"},
        "PCPOLoadRun": {"run": "(newest)", "checkpoint": "latest"},
        "PCPOCompare": {"model": flow.model, "lora": comfy_models.random_lora(flow, 1), "vae": flow.vae,
                        "prompts": flow.prompts, "seed": 0, "steps": 2, "cfg": 1.0},
        "PCPOSampler": {"method": "auto", "noise_level": -1.0, "sigma": "native", "s_noise": 1.0, "target_weight": 0.0},
        "PCPOKSampler": {**sampling, "seed": 0, "steps": 2, "cfg": 1.0, "scheduler": "training", "denoise": 1.0,
                         "method": "auto", "noise_level": -1.0},
        "PCPOPlotCredit": {"model": flow.model, "steps": 4, "method": "auto", "noise_level": -1.0,
                           "credit": "proportionate"},
        "PCPOImplicitReward": {"model": flow.model, "weight": 1.0, "start": 0.0, "end": 1.0},
        "PCPOIRGGuider": {"model": flow.model, "implicit_reward": (aligned,), "positive": flow.positive,
                          "negative": flow.negative, "cfg": 1.0},
        "PCPOIRGKSampler": {**sampling, "implicit_reward": (aligned,), "seed": 0, "steps": 2, "cfg": 1.0,
                            "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0},
        "PCPOHumanVote": {"name": "bad", "question": "?", "choose": "best", "votes": 1},
        "PCPOTrainTaste": {"name": "bad", "liked": "", "disliked": "", "pairs": ""},
        "PCPOLoadTaste": {"taste": "bad"},
        "PCPOCompareBlind": {"images_a": images, "images_b": images, "question": "?", "votes": 1, "seed": 0},
    }[node]  # fmt: skip


def linked_values():
    """For every widget of every node, values that only a link can bring: ComfyUI checks what is typed alone."""
    for node in comfy_host.own_nodes():
        schema = node.GET_SCHEMA()
        for item in schema.inputs:
            wrong = {
                "INT": [-(10**9), 10**30, 0.5, NAN, "many"],
                "FLOAT": [-1e9, 1e9, NAN, INFINITE, "much"],
                "COMBO": ["nothing-like-this", 7],
                "STRING": [7, ["a list"]],
                "BOOLEAN": ["maybe"],
            }.get(item.get_io_type(), [])
            for value in wrong:
                yield pytest.param(schema.node_id, item.id, value, id=f"{schema.node_id}-{item.id}-{value}")


@pytest.mark.parametrize(("node", "widget", "value"), linked_values())
def test_a_linked_value_that_no_widget_could_have_is_refused_by_name(flow, node, widget, value):
    refused(lambda: call(node, **{**inputs_of(flow, node), widget: value}), rf"{widget} is ")


def required_connections():
    for node in comfy_host.own_nodes():
        schema = node.GET_SCHEMA()
        for item in schema.inputs:
            if not item.optional and not isinstance(item, io.WidgetInput):
                yield pytest.param(schema.node_id, item.id, id=f"{schema.node_id}-{item.id}")


@pytest.mark.parametrize(("node", "name"), required_connections())
def test_a_connected_node_that_puts_out_nothing_is_named(flow, node, name):
    """As Load Checkpoint does for a file without a text encoder."""
    refused(lambda: call(node, **{**inputs_of(flow, node), name: None}), f"{name} is empty: ")


def wide(conditioning):
    """As another model's CLIP encodes: wider."""
    return [[torch.cat([tensor, tensor, tensor], -1), extra] for tensor, extra in conditioning]


def prompts_from(conditioning, flow):
    return types.EncodedPrompts(("a fox",), (conditioning,), "", flow.negative)


def pixels(vae):
    other = copy.copy(vae)
    other.latent_channels = 3
    return other


def big(size):
    return {"samples": torch.zeros(1, 16, size, size)}


CONNECTIONS = {
    "latent of 512 pixels": ("latent_image", lambda s: big(64), "positions end at"),
    "latent of an image of another model": (
        "latent_image",
        lambda s: {"samples": torch.rand(1, 4, 8, 8)},
        "16 channels",
    ),
    "latent of a video": ("latent_image", lambda s: {"samples": torch.rand(1, 16, 3, 8, 8)}, "2 dimensions"),
}
PROMPTS = {
    "prompts of another clip": ("prompts", lambda s: prompts_from(wide(s.positive), s), "another model's CLIP"),
    "a vae of pixels": ("vae", lambda s: pixels(s.vae), "decodes latents of 3 channels"),
    "a latent with a mask": (
        "latent_image",
        lambda s: {**s.latent(1), "noise_mask": torch.ones(1, 64, 64)},
        "noise mask",
    ),
}
BY_NODE = {
    "PCPOTrainLoRA": CONNECTIONS | PROMPTS,
    "PCPOCompare": CONNECTIONS | PROMPTS,
    "PCPOKSampler": CONNECTIONS,
    "PCPOIRGKSampler": CONNECTIONS,
}
CASES = [
    pytest.param(node, *case, id=f"{node}-{name}") for node, cases in BY_NODE.items() for name, case in cases.items()
]


@pytest.mark.parametrize(("node", "name", "make", "words"), CASES)
def test_what_does_not_fit_the_model_is_refused_before_any_work(flow, node, name, make, words):
    refused(lambda: call(node, **{**inputs_of(flow, node), name: make(flow)}), words)


@pytest.mark.parametrize("node", ["PCPOKSampler", "PCPOIRGGuider", "PCPOIRGKSampler"])
@pytest.mark.parametrize("which", ["positive", "negative"])
def test_a_conditioning_of_another_clip_is_refused(flow, node, which):
    refused(lambda: call(node, **{**inputs_of(flow, node), which: wide(flow.positive)}), "another model's CLIP")


@pytest.mark.parametrize("node", ["PCPOIRGGuider", "PCPOIRGKSampler"])
def test_aligned_models_of_another_kind_are_refused(flow, eps, node):
    aligned = types.AlignedModel(eps.model, ImplicitReward(1.0))
    refused(lambda: call(node, **{**inputs_of(flow, node), "implicit_reward": (aligned,)}), "of another kind")


def test_a_batch_of_latents_that_has_no_effect_is_reported(flow, caplog):
    """C11: the latent sets the size, and often comes from a sampler's branch of the graph."""
    checks = comfy_host.pack_module("nodes.host.checks")
    with caplog.at_level("WARNING", "pcpo"):
        checks.check_training_latent(flow.model, flow.latent(1))
        assert not caplog.records
        checks.check_training_latent(flow.model, flow.latent(4))
    assert "batch_size has no effect" in caplog.text


def test_a_lora_of_which_no_key_loads_is_refused(flow):
    strange = {"unknown.lora_up.weight": torch.zeros(2, 2), "unknown.lora_down.weight": torch.zeros(2, 2)}
    refused(
        lambda: call("PCPOCompare", **{**inputs_of(flow, "PCPOCompare"), "lora": strange}), "none of the LoRA's 2 keys"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "../up"}, "run.name: must be 1 to 64 letters"),
        ({"name": ""}, "run.name"),
        ({"name": "a/b"}, "run.name"),
        ({"name": "con"}, "Windows reserves"),
        ({"name": "NUL"}, "Windows reserves"),
        ({"name": "lpt1.txt"}, "Windows reserves"),
        ({"name": "ends."}, "run.name"),
        ({"group_size": 3, "prompts_per_update": 1, "credit": "no such"}, "credit is"),
        ({"noise_level": 0.0}, "none of the 2 steps|noise_level above 0"),
    ],
)
def test_widgets_that_cannot_run_are_refused_before_any_work(flow, changes, words):
    refused(lambda: call("PCPOTrainLoRA", **{**inputs_of(flow, "PCPOTrainLoRA"), **changes}), words)


@pytest.mark.parametrize("text", ["", " \n ", "# only a comment"])
def test_no_prompts_are_refused(flow, text):
    refused(lambda: call("PCPOPrompts", flow.clip, text), "no prompts")


def test_weights_that_are_all_0_are_refused(flow):
    other = call("PCPOLoadReward", "redness")[0]
    nothing = call("PCPOCombineRewards", flow.reward, 0.0, other, 0.0)[0]
    refused(
        lambda: call("PCPOTrainLoRA", **{**inputs_of(flow, "PCPOTrainLoRA"), "reward": nothing}), "every weight is 0"
    )


@pytest.mark.parametrize("run", ["nowhere", "", "../up", "con"])
def test_runs_that_do_not_exist_are_refused(run):
    node = comfy_host.load_pack()["PCPOLoadRun"]
    assert re.search("does not exist|contains no runs", str(node.validate_inputs(run=run)))
    refused(lambda: call("PCPOLoadRun", run, "latest"), "run is|does not exist|no runs")


def test_linked_inputs_of_validation_and_fingerprint_are_not_known_yet():
    """ComfyUI passes None for them (C2)."""
    load, train = comfy_host.load_pack()["PCPOLoadRun"], comfy_host.load_pack()["PCPOTrainLoRA"]
    assert load.validate_inputs(run=None) is True and train.validate_inputs(name=None) is True
    first = load.fingerprint_inputs(run=None, checkpoint="latest")
    assert first != first  # NaN: the node runs


def test_an_edited_reward_of_ones_own_is_loaded_again(tmp_path, monkeypatch):
    monkeypatch.setenv("PCPO_REWARD_FOLDER", str(tmp_path))
    own, node = tmp_path / "own.py", comfy_host.load_pack()["PCPOLoadReward"]
    own.write_text("# first")
    before, built_in = node.fingerprint_inputs("own"), node.fingerprint_inputs("colorfulness")
    assert node.fingerprint_inputs("own") == before
    os.utime(own, (0, 0))
    assert node.fingerprint_inputs("own") != before
    assert node.fingerprint_inputs("colorfulness") == built_in


def test_the_newest_run_is_the_one_that_trained_last(tmp_path, monkeypatch):
    """Whatever is put into another run's folder later."""
    monkeypatch.setattr(files, "runs_folder", lambda: tmp_path)
    for at, name in enumerate(("old", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").touch()
        (tmp_path / name / "metrics.jsonl").write_text("{}\n")
        os.utime(tmp_path / name / "metrics.jsonl", (at, at))
    (tmp_path / "old" / "evaluation").mkdir()
    assert files.run_names() == ["new", "old"]


def test_a_bad_name_is_one_error_in_words():
    """ComfyUI repeats the sentence for every input that validate_inputs names (C9)."""
    train = comfy_host.load_pack()["PCPOTrainLoRA"]
    sentence = train.validate_inputs(name="a b")
    assert "run.name" in sentence and "^" not in sentence and "pattern" not in sentence
    assert list(train.validate_inputs.__func__.__code__.co_varnames[:2]) == ["cls", "name"]


class Failing(Reward):
    name = "failing"

    def __init__(self, after):
        super().__init__(comfy_host.pack_module("nodes.rewards").single_reward("redness").rewards[0].settings)
        self.calls, self.after = 0, after

    def score_batch(self, images, prompts):
        self.calls += 1
        if self.calls > self.after:
            raise OSError("my file is gone")
        return images.float().mean((1, 2, 3))


def failing(flow, after):
    setup = copy.copy(flow)
    setup.reward = types.WeightedRewards((Failing(after),), (1.0,))
    return setup


def test_a_reward_that_raises_is_named_before_any_work(flow):
    refused(lambda: failing(flow, 0).train("failing"), r"reward failing raised OSError: my file is gone .*line \d+")


def test_a_run_that_fails_in_its_first_update_does_not_exist_for_others(flow):
    """C7: neither Load Run nor a later name sees it."""
    with pytest.raises(RewardError, match="reward failing raised"):
        failing(flow, 1).train("early")
    assert "early" not in files.run_names()
    assert flow.train("early", updates=1)[3].path.name == "early"


def test_resume_continues_the_run_that_was_started_last(flow):
    """C1: the older run of that name stays as it is, whether the newer one finished an update or not."""
    old = flow.train("trap", updates=1)[3].path
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(RewardError):
        failing(flow, 3).train("trap", updates=3)
    assert files.STARTED["trap"] == "trap-2"
    setup = failing(flow, 99)
    again = setup.train("trap", updates=3, resume=True)
    assert (again[3].path.name, again[2]) == ("trap-2", 3)
    files.STARTED.clear()  # as after a restart
    assert files.last_started("trap") == "trap-2"
    with pytest.raises(RewardError):
        failing(flow, 1).train("trap", updates=1)  # ends in its first update
    assert failing(flow, 99).train("trap", updates=1, resume=True)[3].path.name == "trap-3"
    assert {path: path.read_bytes() for path in before} == before


def test_a_bypass_lora_that_was_removed_leaves_a_model_that_trains(flow):
    """C3: the host puts a module's own forward back as an attribute."""
    module = flow.model.model.diffusion_model.x_embedder
    object.__setattr__(module, "forward", module.forward)
    try:
        assert flow.train("after-bypass", updates=1)[2] == 1
    finally:
        vars(module).pop("forward", None)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("(a fox:1.3)", "a fox"),
        ("a ((red) fox:0.5), green", "a red fox, green"),
        ("a fox \\(plush\\)", "a fox (plush)"),
        ("a fox (", "a fox ("),
        ("a fox", "a fox"),
        ("", ""),
    ],
)
def test_rewards_read_prompts_without_weights(text, plain):
    """C8."""
    assert syntax.plain_prompt(text) == plain
    images = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    scores = call("PCPOLoadReward", "alignment")[0].rewards[0].score(images, [text])
    assert torch.equal(scores, load_reward("alignment").score(images, [plain]))


def test_cancel_while_an_endpoint_hangs_takes_effect_at_once(flow):
    """C5: as an interrupt, not as an error."""
    import socket

    silent = socket.create_server(("127.0.0.1", 0))
    settings = comfy_host.pack_module("nodes.rewards").single_reward("redness").rewards[0].settings
    remote = Remote(settings, Peer(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=60))
    setup = copy.copy(flow)
    setup.reward = types.WeightedRewards((remote,), (1.0,))
    threading.Timer(2.0, mm.interrupt_current_processing).start()
    start = time.monotonic()
    with pytest.raises(mm.InterruptProcessingException):
        setup.train("hanging")
    assert time.monotonic() - start < SECONDS
    silent.close()


class Endless(Failing):
    def score_batch(self, images, prompts):
        threading.Event().wait(60)


def test_cancel_while_a_reward_of_the_user_never_returns_takes_effect_at_once(flow):
    setup, start = failing(flow, 0), time.monotonic()
    setup.reward = types.WeightedRewards((Endless(0),), (1.0,))
    threading.Timer(1.0, mm.interrupt_current_processing).start()
    with pytest.raises(mm.InterruptProcessingException):
        setup.train("endless")
    assert time.monotonic() - start < SECONDS
    assert "endless" not in files.run_names()


def test_cancel_while_prompts_are_encoded_takes_effect_before_the_next_one(flow, monkeypatch):
    """R3: there may be thousands."""
    texts, tokenize = [], flow.clip.tokenize

    def counted(text, *args, **options):
        texts.append(text)
        if len(texts) == 3:
            mm.interrupt_current_processing()
        return tokenize(text, *args, **options)

    monkeypatch.setattr(flow.clip, "tokenize", counted)
    with pytest.raises(mm.InterruptProcessingException):
        call("PCPOPrompts", flow.clip, "\n".join(f"a fox {n}" for n in range(100)))
    assert len(texts) == 3


def test_one_update_gives_a_series_that_plot_loss_graph_can_draw(flow):
    """C12."""
    losses = flow.train("one", updates=1)[1]
    assert min(losses["loss"]) < max(losses["loss"])
    drawable = comfy_host.pack_module("nodes.training").drawable
    assert drawable([0.5]) == [0.0, 0.5] and drawable([1.0, 2.0]) == [1.0, 2.0] and len(set(drawable([0.0]))) == 2


def test_missing_weights_are_wanted_in_comfyuis_folder(flow):
    """C12."""
    reward, folder = call("PCPOLoadReward", "pickscore")[0], files.reward_folder([])
    assert folder is not None and folder.is_absolute() and folder.name == "rewards"
    refused(lambda: reward.rewards[0].score(torch.zeros(1, 8, 8, 3), ["a"]), re.escape(str(folder)))


def test_missing_requirements_are_named_when_the_pack_is_loaded(monkeypatch):
    """C10."""
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tomli_w" else find(name))
    with pytest.raises(ImportError, match=r"not installed: tomli-w. Install them with .* -m pip install -r"):
        sys.modules[str(comfy_host.PACK).replace(".", "_x_")]._require_packages()
