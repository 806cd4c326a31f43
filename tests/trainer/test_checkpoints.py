"""Single-file checkpoints give the pipeline that they were written from; what cannot be loaded is refused in words."""

import json

import diffusers
import original_layout
import pytest
import tiny_pipelines
import torch
import transformers
from running import start_run
from safetensors.torch import save_file

from trainer.config.loading import load
from trainer.config.schema import Config, ConfigError, ModelConfig
from trainer.policy.loading import load_pipeline, make_policy, make_shapes
from trainer.policy.single_file import CHECKPOINT_KINDS, checkpoint_kind, checkpoint_skeleton
from trainer.policy.skeletons import SKELETONS, write_skeleton

pytestmark = pytest.mark.slow

SIZE = {"height": tiny_pipelines.SIDE, "width": tiny_pipelines.SIDE}


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl", "sd3", "sd35"])
def test_a_file_is_the_pipeline_it_was_written_from(family, tmp_path):
    pipeline = tiny_pipelines.build(family)
    folder = tiny_pipelines.save(family, tmp_path)
    found = load_pipeline(str(original_layout.write(pipeline, tmp_path / "model.safetensors")), str(folder))
    assert type(found) is type(pipeline)
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            ours, theirs = getattr(found, name).state_dict(), part.state_dict()
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


FROM_THE_HUB = """
from trainer.policy.loading import load_pipeline
pipeline = load_pipeline("somebody/tiny")
print(type(pipeline).__name__, pipeline.unet.conv_in.weight.sum().item())
"""


def test_a_hub_name_loads_from_the_hubs_cache(tmp_path, script):
    """The cache as a download leaves it, and no network."""
    pipeline, revision = tiny_pipelines.build("sd15"), "0" * 40
    cache = tmp_path / "hub" / "models--somebody--tiny"
    pipeline.save_pretrained(cache / "snapshots" / revision)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(revision)
    child = script(FROM_THE_HUB, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    out, error = child.communicate(timeout=300)
    assert child.returncode == 0, error[-2000:]
    name, value = out.split()
    assert name == "StableDiffusionPipeline"
    assert float(value) == pytest.approx(pipeline.unet.conv_in.weight.sum().item())


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_a_model_in_half_precision_loads_in_float32(family, tmp_path):
    half = tiny_pipelines.build(family).to(torch.float16)
    half.save_pretrained(tmp_path / "half")
    file = original_layout.write(half, tmp_path / "model.safetensors")
    for found in (load_pipeline(str(tmp_path / "half")), load_pipeline(str(file), str(tmp_path / "half"))):
        parts = [part for part in found.components.values() if isinstance(part, torch.nn.Module)]
        assert {p.dtype for part in parts for p in part.parameters()} == {torch.float32}


def test_a_file_trains(tmp_path, make_config):
    folder = tiny_pipelines.save("sd15", tmp_path)
    file = original_layout.write(tiny_pipelines.build("sd15"), tmp_path / "model.safetensors")
    config = make_config(str(file), model={"config": str(folder)}, rollout=SIZE, run={"updates": 1})
    run, updates = start_run(config)
    list(updates)
    assert run.config().model.config == str(folder)
    assert run.records()[0]["first_log_ratio_abs_max"] < 1e-5


@pytest.mark.parametrize("zero_snr", [False, True])
def test_a_v_prediction_mark_is_believed(tmp_path, make_config, zero_snr):
    folder = tiny_pipelines.save("sdxl", tmp_path)
    marks = {"v_pred": torch.zeros(0)} | ({"ztsnr": torch.zeros(0)} if zero_snr else {})
    file = original_layout.write(tiny_pipelines.build("sdxl"), tmp_path / "model.safetensors", **marks)
    wiring = make_policy(make_config(str(file), model={"config": str(folder)}, rollout=SIZE)).adapter
    assert wiring.prediction == "v_prediction"
    assert (wiring.alphas[-1] < 1e-6) == zero_snr


@pytest.mark.parametrize(
    ("name", "part", "millions"),
    [
        ("StableDiffusionPipeline", "unet", 859.520964),
        ("StableDiffusionPipeline", "vae", 83.653863),
        ("StableDiffusionPipeline", "text_encoder", 123.060480),
        ("StableDiffusionXLPipeline", "unet", 2567.463684),
        ("StableDiffusionXLPipeline", "text_encoder_2", 694.659840),
    ],
)
def test_a_skeleton_has_as_many_parameters_as_the_published_model(name, part, millions):
    config = dict(SKELETONS[name][part])
    with torch.device("meta"):
        if part.startswith("text"):
            model = getattr(transformers, config["architectures"][0])(transformers.CLIPTextConfig(**config))
        else:
            model = getattr(diffusers, config.pop("_class_name")).from_config(config)
    assert sum(p.numel() for p in model.parameters()) == round(millions * 1e6)


@pytest.mark.parametrize(("name", "spacing"), [("sd_xl_turbo_1.0_fp16", "trailing"), ("juggernautXL_v9", "leading")])
def test_the_scheduler_of_a_file_named_as_distilled_begins_at_pure_noise(name, spacing, tmp_path):
    folder = checkpoint_skeleton(tmp_path / f"{name}.safetensors", CHECKPOINT_KINDS[0], tmp_path)
    assert diffusers.DDIMScheduler.from_pretrained(folder, subfolder="scheduler").config["timestep_spacing"] == spacing


def test_a_skeletons_tokenizer_is_clips(tmp_path):
    folder = write_skeleton("StableDiffusionXLPipeline", tmp_path)
    expected = [49406, 320, 1125, 539, 320, 2368, 49407]  # as OpenAI's
    for name, pad in (("tokenizer", 49407), ("tokenizer_2", 0)):
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / name)
        assert len(tokenizer) == 49408
        assert tokenizer("a photo of a cat").input_ids == expected
        assert tokenizer("a photo of a cat", padding="max_length", max_length=9).input_ids == [*expected, pad, pad]
    index = diffusers.DiffusionPipeline.load_config(folder)
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"] and index["text_encoder_2"][0] == "transformers"


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("conditioner.embedders.1.model.ln_final.bias", "StableDiffusionXLPipeline"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "StableDiffusionPipeline"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn2.qkv.bias", "stabilityai/stable-diffusion-3.5-medium"),
        ("joint_blocks.37.x_block.mlp.fc1.bias", "stabilityai/stable-diffusion-3.5-large"),
        ("joint_blocks.0.x_block.mlp.fc1.bias", "stabilityai/stable-diffusion-3-medium-diffusers"),
        ("model.diffusion_model.double_blocks.0.img_mod.lin.bias", "black-forest-labs/FLUX.1-dev"),
    ],
)
def test_a_checkpoint_is_told_by_its_keys(key, kind, tmp_path):
    found = checkpoint_kind({key, "joint_blocks.0.x_block.mlp.fc1.bias"} if "joint" in key else {key}, tmp_path)
    assert found in CHECKPOINT_KINDS and kind in (found.pipeline, found.base)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("lora_unet_a.lora_up.weight", "is a LoRA, not a model. Give it as lora.start"),
        ("model.diffusion_model.input_blocks.0.0.bias", "is a UNet without text encoders"),
        ("blocks.0.weight", "holds 1 tensors, but none that identifies"),
        ("cond_stage_model.model.ln_final.bias", "SD2 checkpoint, which does not say .* Set model.config"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_refused(key, message, tmp_path):
    save_file({key: torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=message):
        load_pipeline(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("mark", ["edm_mean", "edm_vpred.sigma_max"])
def test_a_file_of_edms_noise_levels_is_refused(mark, tmp_path):
    state = {"conditioner.embedders.1.model.ln_final.bias": torch.zeros(1), mark: torch.zeros(1)}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=f"has {mark}: its model is trained on EDM's noise levels"):
        load_pipeline(str(tmp_path / "model.safetensors"))


def test_a_quantised_file_is_refused(tmp_path):
    state = {
        "double_blocks.0.img_mod.lin.weight": torch.zeros(1),
        "double_blocks.0.img_mod.lin.scale_weight": torch.ones(1),
    }
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"1 of its tensors are scales, such as double_blocks.*scale_weight"):
        load_pipeline(str(tmp_path / "model.safetensors"))


def test_broken_and_missing_and_pickled_files_are_refused(tmp_path):
    broken = tmp_path / "model.safetensors"
    broken.write_bytes(b"not a model")
    with pytest.raises(ConfigError, match="not an intact safetensors file"):
        load_pipeline(str(broken))
    with pytest.raises(ConfigError, match="does not exist"):
        load_pipeline(str(tmp_path / "other.safetensors"))
    with pytest.raises(ConfigError, match="may hold code"):
        load_pipeline(str(tmp_path / "model.ckpt"))


def shapes_of(name):
    return make_shapes(Config(model=ModelConfig(name=name)))


@pytest.mark.parametrize("read", [load_pipeline, shapes_of])
def test_a_folder_of_a_pipeline_that_diffusers_lacks_is_refused(read, tmp_path):
    folder = tiny_pipelines.save("sd15", tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "NotYetPipeline"}))
    with pytest.raises(ConfigError, match=r"no attribute NotYetPipeline\. .* installed diffusers .* lacks\. Update"):
        read(str(folder))


@pytest.mark.parametrize("read", [load_pipeline, shapes_of])
def test_a_library_that_a_model_needs_and_this_computer_lacks_is_named(read, tmp_path, monkeypatch):
    def lacking(*_, **__):
        raise ImportError("\nCLIPTokenizer requires the SentencePiece library but it was not found. See its page.")

    folder = tiny_pipelines.save("sd15", tmp_path)
    monkeypatch.setattr(transformers.CLIPTokenizer, "from_pretrained", lacking)
    with pytest.raises(ConfigError, match=r"loaded: CLIPTokenizer requires the Sent.* found\. Install what is missing"):
        read(str(folder))


def test_a_relative_path_that_looks_like_a_hub_name_may_be_a_missing_folder():
    with pytest.raises(ConfigError, match="There is no folder models/mine here, so it was taken for a hub name"):
        load_pipeline("models/mine")


def test_a_config_of_another_kind_is_refused(tmp_path):
    file = original_layout.write(tiny_pipelines.build("sd15"), tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="is a StableDiffusionXLPipeline, but the checkpoint is a StableDiffusionPip"):
        load_pipeline(str(file), str(tiny_pipelines.save("sdxl", tmp_path)))
    with pytest.raises(ConfigError, match=r"has no model_index.json"):
        load_pipeline(str(file), str(tmp_path))


def test_a_file_that_needs_more_than_is_there_says_what(tmp_path):
    """FLUX's text encoders and VAE are neither in a folder nor on the hub."""
    save_file({"double_blocks.0.img_mod.lin.bias": torch.zeros(1)}, tmp_path / "flux.safetensors")
    with pytest.raises(ConfigError, match=r"nowhere is no folder. Give the folder of a diffusers pipeline"):
        load_pipeline(str(tmp_path / "flux.safetensors"), str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"set model.config to a folder or hub name"):
        load_pipeline(str(tmp_path / "flux.safetensors"), "nobody/nothing")


def test_a_models_path_in_a_configuration_is_relative_to_it(tmp_path):
    (tmp_path / "mine").mkdir()
    for name, expected in (("mine", str(tmp_path / "mine")), ("stabilityai/x", "stabilityai/x")):
        (tmp_path / "run.toml").write_text(f'[model]\nname = "{name}"\nconfig = "{name}"\n')
        config = load(tmp_path / "run.toml")
        assert (config.model.name, config.model.config) == (expected, expected)


def test_a_hub_that_cannot_be_reached_is_told_as_such(tmp_path, script):
    child = script(FROM_THE_HUB, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    _, error = child.communicate(timeout=300)
    last = error.strip().splitlines()[-1]
    assert "has no copy of it" in last and "the Hugging Face hub cannot be reached" in last
