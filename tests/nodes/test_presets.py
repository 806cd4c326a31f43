"""Train LoRA (PCPO, GRPO) with every widget at its default trains any family by its recipe."""

import logging
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "support"))
import comfy_host

comfy_host.skip_without_host()

comfy_host.load_pack()
import comfy_families  # noqa: E402
import comfy_models  # noqa: E402
import host_models  # noqa: E402
import torch  # noqa: E402

pytestmark = pytest.mark.slow

job = comfy_host.pack_module("nodes.job")
host_presets = comfy_host.pack_module("nodes.host.presets")
host_spaces = comfy_host.pack_module("nodes.host.spaces")
presets = comfy_host.pack_module("trainer.config.presets")
training = comfy_host.pack_module("nodes.training")
types = comfy_host.pack_module("nodes.types")
GIB = 2**30
EXPECTED = {
    "z-image": "z-image", "lumina2": "lumina2", "anima": "anima", "cosmos-predict2": "cosmos", "wan": "wan",
    "ideogram4": "ideogram4", "hidream": "hidream", "ernie-image": "ernie-image", "krea2": "krea2", "chroma": "chroma",
    "flux2": "flux2-klein", "qwen-image": "qwen-image", "sd3": "sd3",
}  # fmt: skip


def defaults():
    """The value of every widget when the node is added to a graph."""
    inputs = training.TrainLoRA.GET_SCHEMA().inputs
    values = {i.id: i.default for i in inputs if getattr(i, "default", None) is not None}
    return {key: value for key, value in values.items() if key != "resume"}


def configured(model, side, monkeypatch, **widgets):
    """The configuration of a run on a card with 24 GiB of room."""
    monkeypatch.setattr(job, "training_room", lambda model: presets.Room(24 * GIB, gpu=True))
    reward = types.WeightedRewards(comfy_host.execute("PCPOLoadReward", "colorfulness")[0].rewards, (1.0,))
    prompts = types.EncodedPrompts(("a fox",), (None,), "", None)
    channels = model.model.latent_format.latent_channels
    latent = torch.zeros(1, channels, side // 8, side // 8)
    inputs = job.TrainingInputs(model, host_models.small_vae(channels), prompts, reward, latent, None, False)
    return job.make_config(inputs, training.config_sections({**defaults(), **widgets}))


WIDGETS = {  # widget -> (the option that it fills, a value that is not its default)
    "gradient_checkpointing": ("model.gradient_checkpointing", True),
    "prompts_per_update": ("rollout.prompts_per_update", 3),
    "group_size": ("rollout.group_size", 6),
    "steps": ("rollout.steps", 7),
    "cfg": ("rollout.cfg", 2.5),
    "method": ("rollout.method", "cps"),
    "noise_level": ("rollout.noise_level", 0.4),
    "images_at_once": ("rollout.images_at_once", 5),
    "branch": ("rollout.branch", 2),
    "branch_first": ("rollout.branch_first", 4),
    "branch_points": ("rollout.branch_points", 9),
    "objective": ("objective.name", "ppo"),
    "credit": ("objective.credit", "native"),
    "clip_range": ("objective.clip_range", 0.03),
    "kl_weight": ("objective.kl_weight", 0.2),
    "train_steps": ("objective.train_steps", 0.5),
    "rank": ("lora.rank", 12),
    "learning_rate": ("optimizer.learning_rate", 2e-4),
    "name": ("run.name", "mine"),
    "updates": ("run.updates", 13),
    "seed": ("run.seed", 17),
    "preview_every": ("run.preview_every", 2),
    "save_every": ("run.save_every", 11),
    "guard_every": ("guard.every", 8),
}


def test_every_widget_fills_its_option():
    assert set(WIDGETS) == set(defaults()) and all(WIDGETS[key][1] != value for key, value in defaults().items())
    tree = training.config_sections({widget: value for widget, (_, value) in WIDGETS.items()})
    filled = {f"{section}.{key}": value for section, values in tree.items() for key, value in values.items()}
    assert filled == {**dict(WIDGETS.values()), "optimizer.minibatches": 2}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_family_has_a_preset(name):
    assert host_presets.host_preset(host_models.make(name).model) == EXPECTED[name]


@pytest.mark.parametrize(
    ("file", "preset"),
    [("z_image_turbo_bf16.safetensors", "z-image-distilled"), ("z_image_bf16.safetensors", "z-image")],
)
def test_a_distilled_model_is_known_by_its_file(file, preset):
    model = host_models.make("z-image").model
    model.cached_patcher_init = (print, (f"/models/diffusion_models/{file}", {}))
    assert host_presets.host_preset(model) == preset


@pytest.mark.parametrize(
    ("file", "timesteps"),
    [("sd_xl_turbo_1.0_fp16.safetensors", [999, 749, 499, 249]), ("juggernautXL_v9.safetensors", [751, 501, 251, 1])],
)
def test_a_distilled_epsilon_model_begins_at_pure_noise_as_in_the_trainer(file, timesteps):
    model = comfy_families.make("sdxl").model
    model.cached_patcher_init = (print, (f"/models/checkpoints/{file}", {}))
    assert host_spaces.training_grid(host_spaces.space_of(model), 4).timesteps.tolist() == timesteps


def test_sdxl_trains_with_guidance_and_flux_without(monkeypatch):
    sdxl = configured(comfy_families.make("sdxl").model, 1024, monkeypatch)
    flux = configured(comfy_families.make("flux").model, 512, monkeypatch)
    assert (sdxl.rollout.steps, sdxl.rollout.cfg, sdxl.lora.rank) == (30, 5.0, 16)
    assert (flux.rollout.steps, flux.rollout.cfg, flux.rollout.noise_level) == (6, 1.0, 0.9)
    assert sdxl.model.gradient_checkpointing and sdxl.rollout.images_at_once == 10


def test_a_given_widget_wins_and_the_first_line_shows_the_rest(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="pcpo")
    config = configured(comfy_families.make("flux").model, 1024, monkeypatch, steps=9, cfg=2.0)
    assert (config.rollout.steps, config.rollout.cfg, config.lora.rank) == (9, 2.0, 32)
    first, second = caplog.messages[:2]
    assert "auto for flux: " in first and "lora.rank 32" in first and "rollout.steps" not in first
    assert "training at 1024 x 1024 pixels; the recipe trains at 512 x 512" in second


def test_the_embedded_models_train_well_with_the_defaults():
    tiny = comfy_models.Tiny("emoji-flow")
    widgets = {key: value for key, value in defaults().items() if key not in ("name", "updates")}
    _, _, steps, run = tiny.train("defaults", updates=1, **widgets)
    config = comfy_host.pack_module("trainer.runs.folder").RunFolder(run.path).config()
    assert steps == 1
    assert (config.rollout.steps, config.optimizer.learning_rate, config.lora.targets) == (10, 0.003, "linear")


@pytest.mark.parametrize("name", ["wan", "flux2", "z-image"])
def test_the_node_trains_other_families_and_load_run_gives_the_same_file(name):
    family = host_models.make(name)
    widgets = {**defaults(), "name": f"of-{name}", "updates": 1, "prompts_per_update": 1, "group_size": 2, "steps": 3}
    lora, _, steps, _ = comfy_host.execute(
        "PCPOTrainLoRA", model=family.model, vae=family.vae, prompts=family.prompts,
        reward=comfy_host.execute("PCPOLoadReward", "colorfulness")[0], latent_image=family.latent(), **widgets,
    )  # fmt: skip
    again = comfy_host.execute("PCPOLoadRun", run=f"of-{name}", checkpoint="latest")[1]
    prefix = "diffusion_model." if name == "wan" else "transformer."
    assert steps == 1 and lora and all(key.startswith(prefix) for key in lora)
    assert lora.keys() == again.keys() and all(torch.equal(lora[key], again[key]) for key in lora)
