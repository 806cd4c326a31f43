"""`auto` stands for the values of the model's family, a given value wins, and what was chosen is shown."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trainer.cli.main import main
from trainer.config import presets
from trainer.config.loading import build, load, merge, with_preset
from trainer.config.presets import AUTO, PRESET_OPTIONS, PRESETS, Room, preset_name, resolved
from trainer.policy.model_family import PIPELINE_FAMILIES, index_preset, model_preset, weight_bytes

GIB = 2**30
ALL = (*PRESET_OPTIONS, ("rollout", "images_at_once"), ("model", "gradient_checkpointing"))


def automatic(**given):
    tree = {}
    for section, key in ALL:
        tree.setdefault(section, {})[key] = AUTO
    return merge(tree, given)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("objective", ["log_hinge", "nft"])
def test_every_preset_makes_a_valid_configuration(name, objective):
    tree, chosen = resolved(automatic(objective={"name": objective}), name, Room(16 * GIB, gpu=True))
    config, preset = build(tree, name), PRESETS[name]
    assert (config.rollout.steps, config.lora.rank) == (preset.steps, preset.rank)
    assert chosen["optimizer.learning_rate"] == config.optimizer.learning_rate == preset.learning_rate
    assert config.rollout.noise_level == (preset.noise_level if objective == "log_hinge" else None)
    assert AUTO not in (v for v in chosen.values())


def test_a_given_value_wins():
    given = automatic(rollout={"steps": 7}, lora={"rank": 3})
    tree, chosen = resolved(given, "sdxl", Room(1e12, gpu=True))
    assert (tree["rollout"]["steps"], tree["lora"]["rank"]) == (7, 3)
    assert "rollout.steps" not in chosen and chosen["rollout.cfg"] == 5.0


def test_only_one_option_decides_which_steps_are_trained():
    def branch_and_window(preset, **given):
        tree = resolved(automatic(**given), preset, Room(1e12, gpu=False))[0]
        return tree["rollout"].get("branch"), tree["rollout"].get("sde_window")

    assert branch_and_window("embedded") == (1, 0)
    assert branch_and_window("embedded", objective={"name": "nft"}) == (None, None)
    assert branch_and_window("embedded", objective={"name": "nobody"}) == (1, 0)  # told when it is built
    assert branch_and_window("embedded", model={"shard": True}) == (None, 0)
    assert branch_and_window("embedded", objective={"train_steps": 0.5}) == (None, 0)
    assert branch_and_window("embedded", rollout={"sde_window": 2}) == (None, 2)
    assert branch_and_window("embedded", objective={"train_steps": "half"}) == (1, 0)  # told when it is built
    assert branch_and_window("z-image") == (0, 1)
    assert branch_and_window("z-image", rollout={"branch": 2}) == (2, None)


def test_sdxl_trains_with_guidance_and_flux_without():
    assert PRESETS["sdxl"].cfg == 5.0 and PRESETS["flux"].cfg == 1.0


@pytest.mark.parametrize(
    ("free", "images", "checkpointing"), [(400, 16, False), (24, 10, True), (3, 1, True), (0.1, 1, True)]
)
def test_less_free_memory_means_fewer_images_at_once(free, images, checkpointing):
    chosen = resolved(automatic(), "sdxl", Room(free * GIB, gpu=True))[1]
    assert chosen["rollout.images_at_once"] == images
    assert chosen["model.gradient_checkpointing"] == checkpointing


def test_a_quarter_of_the_pixels_allows_four_times_the_images():
    def images(side):
        tree = automatic(rollout={"height": side, "width": side}, model={"gradient_checkpointing": True})
        return resolved(tree, "sdxl", Room(6 * GIB, gpu=True))[1]["rollout.images_at_once"]

    assert (images(1024), images(512)) == (2, 10)


def test_without_a_height_the_models_own_size_counts():
    def images(**rollout):
        tree = automatic(rollout=rollout, model={"gradient_checkpointing": True})
        return resolved(tree, "flux", Room(4 * GIB, gpu=True))[1]["rollout.images_at_once"]

    assert (images(height=None, width=None), images(height=1024, width=1024), images()) == (1, 1, 5)


def test_weights_are_counted_by_the_headers_of_their_files(tmp_path):
    for part, file in (("unet", "diffusion_pytorch_model"), ("unet", "diffusion_pytorch_model.fp16"), ("vae", "model")):
        (tmp_path / part).mkdir(exist_ok=True)
        save_file({"w": torch.zeros(100, 10)}, tmp_path / part / f"{file}.safetensors")
    (tmp_path / "model_index.json").write_text("{}")
    model = {"name": str(tmp_path), "precision": "bfloat16", "quantize": "none", "offload": True}
    assert weight_bytes(model) == 2000
    assert weight_bytes({**model, "offload": False}) == 4000
    assert weight_bytes({**model, "quantize": "fp8", "offload": False}) == 3000
    assert weight_bytes({**model, "precision": "float32"}) == 4000
    assert weight_bytes({**model, "name": "somewhere/else"}) == 0


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("emoji-flow", "embedded"),
        ("stabilityai/stable-diffusion-xl-base-1.0", "sdxl"),
        ("black-forest-labs/FLUX.1-schnell", "flux-distilled"),
        ("black-forest-labs/FLUX.2-klein-4B", "flux2-klein"),
        ("black-forest-labs/FLUX.2-klein-base-4B", "flux2-klein-base"),
        ("Tongyi-MAI/Z-Image-Turbo", "z-image-distilled"),
        ("Tongyi-MAI/Z-Image", "z-image"),
        ("Qwen/Qwen-Image-2512", "qwen-image"),
        ("Qwen/Qwen-Image-2.1", "qwen-image-2.1"),
        ("someone/else", "flow"),
    ],
)
def test_names_tell_the_preset(name, preset):
    assert model_preset(name) == preset


class Hub(BaseHTTPRequestHandler):
    """The hub's file endpoint with two models whose names do not tell what they are."""

    files = {  # noqa: RUF012
        "/someone/mine/resolve/main/model_index.json": {"_class_name": "StableDiffusionXLPipeline"},
        "/someone/other/resolve/main/model_index.json": {"_class_name": "StableDiffusionPipeline"},
        "/someone/other/resolve/main/unet/config.json": {"cross_attention_dim": 1024},
    }

    def do_HEAD(self):
        content = self.files.get(self.path)
        body = json.dumps(content).encode()
        self.send_response(404 if content is None else 200)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_GET = do_HEAD

    def log_message(self, format, *args):
        pass


HUB_NAMES = ("someone/mine", "someone/other", "someone/neither-sdxl")
PRESETS_OF_NAMES = """
import sys
from trainer.policy.model_family import model_preset
print(*map(model_preset, sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_hub_models_preset_is_read_from_its_index(tmp_path, script):
    """Without the hub its copy tells, and without a copy the name."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def presets_of_names(home, processes=1):
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
        hub["WORLD_SIZE"] = str(processes)
        out, error = script(PRESETS_OF_NAMES, *HUB_NAMES, HF_HOME=str(tmp_path / home), **hub).communicate(timeout=60)
        return out.split() or error

    assert presets_of_names("copy") == ["sdxl", "sd2", "sdxl"]
    server.shutdown()
    server.server_close()
    assert presets_of_names("copy") == ["sdxl", "sd2", "sdxl"]
    assert presets_of_names("none") == ["flow", "flow", "sdxl"]
    assert "by which several processes choose the same settings" in presets_of_names("none", processes=2)


@pytest.mark.parametrize("kind", PIPELINE_FAMILIES)
def test_a_folder_tells_its_preset(kind, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    preset = "flux2-klein" if "Klein" in kind else PIPELINE_FAMILIES[kind]
    assert model_preset(str(tmp_path / "model")) == preset
    assert preset in PRESETS


@pytest.mark.parametrize(
    ("kind", "distilled", "name", "preset"),
    [
        ("Flux2KleinPipeline", True, "mine", "flux2-klein"),
        ("Flux2KleinPipeline", False, "mine", "flux2-klein-base"),
        ("Flux2KleinPipeline", None, "klein-base-9B", "flux2-klein-base"),
        ("Flux2Pipeline", None, "dev", "flux2"),
        ("Krea2Pipeline", True, "mine", "krea2-distilled"),
        ("Krea2Pipeline", False, "mine", "krea2"),
        ("ZImagePipeline", None, "Z-Image-Turbo", "z-image-distilled"),
        ("QwenImagePipeline", None, "Qwen-Image-2512", "qwen-image"),
    ],
)
def test_an_index_tells_few_step_models(kind, distilled, name, preset):
    index = {"_class_name": kind} | ({} if distilled is None else {"is_distilled": distilled})
    assert index_preset(index, name) == preset


FEW_STEPS = (
    "sd_xl_turbo_1.0_fp16", "SDXL-Lightning_4step", "sdxl_lightning_4step_lora", "Hyper-SDXL-8steps", "HyperSDXL",
    "dreamshaperXL_lightningDPMSDE", "realvisxlV50_v50LightningBakedvae", "turbovisionxlSuperFastXL", "photonXL_LCM",
    "dreamshaperXL8LCM", "sdxl_dmd2", "DMD2_SDXL_4step", "sdxl-distilled",
)  # fmt: skip
MANY_STEPS = (
    "hyperrealismXL_v10", "breakfast_sdxl", "sd_xl_base_1.0", "hyperdetailedXL", "fastnegative_none",
    "sdxl-de-distilled", "sdxl_undistilled", "juggernautXL_v9", "steadfastXL",
)  # fmt: skip


@pytest.mark.parametrize("name", FEW_STEPS)
def test_names_of_few_step_models_are_recognised(name):
    assert preset_name("sdxl", f"{name}.safetensors") == "sdxl-distilled"


@pytest.mark.parametrize("name", MANY_STEPS)
def test_names_that_only_contain_such_a_word_are_not(name):
    assert preset_name("sdxl", f"{name}.safetensors") == "sdxl"


def test_an_sd2_model_takes_its_preset_whether_or_not_it_is_on_this_computer(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    for width, preset in ((768, "sd15"), (1024, "sd2")):
        (tmp_path / "unet" / "config.json").write_text(json.dumps({"cross_attention_dim": width}))
        assert model_preset(str(tmp_path)) == preset
    assert model_preset("stabilityai/stable-diffusion-2-1") == "sd2"
    save_file({"cond_stage_model.model.ln_final.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert model_preset(str(tmp_path / "model.safetensors")) == "sd2"


def test_auto_needs_no_gpu_where_it_does_not_depend_on_memory():
    """The example configurations name cuda, and `check` runs anywhere."""
    tree = {"model": {"device": "cuda:9"}, "rollout": {"steps": "auto"}}
    assert with_preset(tree)[0]["rollout"] == {"steps": PRESETS["embedded"].steps}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a computer without a GPU")
def test_a_gpu_that_this_computer_lacks_has_no_room():
    """So that `check` estimates the least that a configuration takes."""
    tree = {"model": {"gradient_checkpointing": "auto"}, "rollout": {"images_at_once": "auto"}}
    for device, chosen in (("cuda", (True, 1)), ("auto", (False, 16)), ("cpu", (False, 16))):
        filled = with_preset(merge(tree, {"model": {"device": device}}))[0]
        assert (filled["model"]["gradient_checkpointing"], filled["rollout"]["images_at_once"]) == chosen


def test_distilled_models_of_a_family_without_such_a_preset_take_the_familys():
    assert preset_name("chroma", "chroma-flash-distilled") == "chroma"


def test_auto_in_a_file_is_resolved_and_shown_by_check(tmp_path, capsys):
    file = tmp_path / "auto.toml"
    file.write_text('[rollout]\nsteps = "auto"\ncfg = "auto"\n[lora]\nrank = 5\ntargets = "auto"\n')
    config = load(file)
    assert (config.rollout.steps, config.lora.rank, config.lora.targets) == (10, 5, "linear")
    assert main(["check", str(file), "--optimizer.learning-rate", "auto", "--prompts.lines", "a fox"]) == 0
    shown = capsys.readouterr()
    assert "auto for embedded: rollout.steps 10, rollout.cfg 1, lora.targets linear" in shown.err
    assert "optimizer.learning_rate 0.003" in shown.err and "learning_rate = 0.003" in shown.out


def test_every_preset_has_its_source_in_a_comment():
    text = Path(presets.__file__).read_text(encoding="utf-8")
    body = text[text.index("PRESETS: ") : text.index("PRESET_OPTIONS: ")]
    entries = [m.start() for m in re.finditer(r'^    "', body, re.MULTILINE)]
    commented = [start for start in entries if body[:start].rstrip().splitlines()[-1].strip().startswith("#")]
    assert len(PRESETS) == len(entries) >= 20 and len(commented) >= 17
