"""Every family, from prompt to trained LoRA, on a tiny pipeline of its own classes."""

import copy
import math
from typing import Any

import diffusers
import pytest
import tiny_pipelines
import torch
from running import resume_run, start_run
from torch.nn import functional as F

from comfyui_pcpo.lora.targets import is_target
from comfyui_pcpo.method.rollout import GroupNoise, rollout
from comfyui_pcpo.method.samplers import deterministic
from comfyui_pcpo.method.schedule import flow_grid
from trainer.config.schema import ConfigError
from trainer.evaluation.source import read_pairs
from trainer.policy.diffusers_policy import DiffusersPolicy, module_names
from trainer.policy.families import FAMILIES, denoiser_of
from trainer.policy.families.base import resolution_mu
from trainer.policy.families.flux import pack, unpack
from trainer.policy.lora_pairs import load_pairs
from trainer.runs.export import FORMATS, ExportOptions, export_lora
from trainer.runs.folder import RunFolder

pytestmark = pytest.mark.slow

PROMPTS = ["a fox", "two red stars"]
PACKED = ("flux", "qwen-image", "chroma", "krea2")
FLUX2 = ("flux2", "flux2-klein")
RAGGED = ("z-image", "chroma")  # each text keeps its own length
UNETS = ("sd15", "sd21", "sdxl")
DEAD_ENDS = ("add_q_proj", "to_add_out", "txt_mlp")  # what the last block computes for text alone


@pytest.fixture(scope="module")
def pipelines():
    """Each tiny pipeline once; policies train copies."""
    return {name: tiny_pipelines.build(name) for name in tiny_pipelines.PIPELINES}


@pytest.fixture(params=tiny_pipelines.LORAS)
def family(request) -> str:
    return request.param


def policy_of(pipeline, make_config, **sections):
    sections["rollout"] = {**tiny_pipelines.size(pipeline), **sections.get("rollout", {})}
    return DiffusersPolicy(copy.deepcopy(pipeline), make_config("given", **sections))


def plain(name, pipeline, latents, cfg, output):
    """What the pipeline itself makes of the same start in 3 steps."""
    given: dict[str, Any] = {"prompt": [*PROMPTS], "negative_prompt": ["dark"] * 2}
    given["true_cfg_scale" if name in ("flux", "qwen-image", "qwen-image-2.1") else "guidance_scale"] = cfg
    if name in ("z-image", "krea2"):
        given["guidance_scale"] = cfg - 1  # their pipelines add to the conditional branch
    if name == "chroma":
        given = {"guidance_scale": cfg} | masked(pipeline)
    if name in FLUX2:
        del given["negative_prompt"]  # its own is empty
    length = {"max_sequence_length": tiny_pipelines.T5_LENGTH}
    more = {"flux": {"guidance_scale": 3.5, **length}, "sd3": length, "sd35": {"max_sequence_length": 0}}
    given |= more.get(name, {})
    start, size = pack(latents) if name in PACKED else latents.clone(), tiny_pipelines.size(pipeline)
    if name == "qwen-image-2.1":
        start = latents.flatten(2).transpose(1, 2)
    images = pipeline(num_inference_steps=3, latents=start, output_type=output, **size, **given).images
    if output != "latent":
        return images[:, :3]
    if name in ("flux2", "qwen-image-2.1"):
        return images.transpose(1, 2).unflatten(2, latents.shape[2:])
    if name == "flux2-klein":  # its pipeline hands over the VAE's latents
        bn = pipeline.vae.bn
        return F.batch_norm(F.pixel_unshuffle(images, 2), bn.running_mean, bn.running_var, eps=bn.eps)
    return unpack(images, 4, 4) if name in PACKED else images


def masked(pipeline):
    """Chroma's prompts with masks that mask; the pipeline's own are numbers, which attention adds."""
    found = pipeline.encode_prompt(PROMPTS, ["dark"] * 2, max_sequence_length=tiny_pipelines.T5_LENGTH)
    prompt, _, mask, negative, _, negative_mask = found
    return {"prompt_embeds": prompt, "prompt_attention_mask": mask.bool(), "negative_prompt_embeds": negative,
            "negative_prompt_attention_mask": negative_mask.bool()}  # fmt: skip


@pytest.mark.parametrize("family", tiny_pipelines.PIPELINES)
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_a_deterministic_sample_is_the_plain_pipelines(pipelines, make_config, family, cfg):
    negative = "" if family in FLUX2 else "dark"
    sections = {"guidance" if family == "flux2" else "cfg": cfg}  # its pipeline has no second branch
    policy = policy_of(pipelines[family], make_config, rollout=sections, prompts={"negative": negative})
    condition, grid = policy.encode(PROMPTS), policy.grid(3)
    noise = GroupNoise([1, 2], 1, policy.latent_shape)
    path = rollout(
        lambda x, t, rows: policy.predict(x, t, condition), grid, deterministic(grid), noise, [torch.arange(2)]
    )
    latents = plain(family, pipelines[family], path.latents[0], cfg, "latent")
    torch.testing.assert_close(path.final, latents, rtol=1e-4, atol=1e-4)
    pictures = plain(family, pipelines[family], path.latents[0], cfg, "pt").permute(0, 2, 3, 1)
    torch.testing.assert_close(policy.decode(path.final), pictures, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", RAGGED)
def test_texts_of_different_lengths_share_a_call(pipelines, make_config, name):
    """Each image as it would be alone, with its own text and that of the negative prompt."""
    policy = policy_of(pipelines[name], make_config, rollout={"cfg": 4.0}, prompts={"negative": "dark " * 12})
    prompts = ["a fox", "red stars " * 8, "a cat"]
    condition = policy.encode(prompts)
    lengths = [len(text) for text in next(iter(condition.positive.values()))]
    assert lengths[0] == lengths[2] < lengths[1]
    x = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    together = policy.predict(x, 500, condition.rows([0, 1, 2]))
    alone = [policy.predict(x[i : i + 1], 500, condition.rows([i])) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.fixture
def trained(family, pipelines, tmp_path, make_config):
    """A finished run of two updates, and its configuration's maker."""
    folder, size = tiny_pipelines.save(family, tmp_path / "models"), tiny_pipelines.size(pipelines[family])

    def config(name, updates=2):
        return make_config(
            str(folder), rollout={**size, "cfg": 2.0}, lora={"targets": "all"}, run={"name": name, "updates": updates}
        )

    run, updates = start_run(config("whole"))
    list(updates)
    return run, config


def test_a_run_starts_at_ratio_one_learns_and_resumes_to_the_same_numbers(family, trained):
    run, config = trained
    for row in run.records():
        assert row["first_log_ratio_abs_max"] < 0.01 * config("x").objective.clip_range
        assert row["grad_norm"] > 0
    lora = load_pairs(run.checkpoint() / "lora.safetensors")
    still = [name for name, (_, up) in lora.items() if up.abs().max() == 0]
    assert all(name.startswith("transformer_blocks.") and any(end in name for end in DEAD_ENDS) for name in still)

    half, updates = start_run(config("half", updates=1))
    list(updates)
    _, _, updates = resume_run(half.path, updates=2)
    list(updates)
    again = load_pairs(RunFolder(half.path).checkpoint() / "lora.safetensors")
    assert again.keys() == lora.keys()
    assert all(torch.equal(ours, theirs) for name in lora for ours, theirs in zip(lora[name], again[name], strict=True))
    strip = [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in run.records()]
    assert strip == [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in half.records()]


def test_a_runs_export_reloads_as_what_was_trained(family, trained, pipelines):
    run, expected = trained[0], trained[0].lora()
    names = module_names(denoiser_of(pipelines[family]))
    for layout in FORMATS:
        found = read_pairs(export_lora(run.path, ExportOptions(layout)), names)
        assert found.keys() == expected.keys()
        for name, (down, up) in expected.items():
            product = found[name][1].flatten(1) @ found[name][0].flatten(1)
            torch.testing.assert_close(product, up.flatten(1) @ down.flatten(1), rtol=1e-5, atol=1e-7)


def test_the_update_repeats_the_rollouts_output_in_bfloat16_with_checkpointing(pipelines, make_config, family):
    model = {"precision": "bfloat16", "gradient_checkpointing": True}
    policy = policy_of(pipelines[family], make_config, rollout={"cfg": 2.0}, model=model)
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    condition = policy.encode(PROMPTS)
    with torch.no_grad():
        old = policy.predict(x, 500, condition)
    new = policy.predict(x, 500, condition)
    assert old.dtype == torch.float32 and torch.equal(new, old)
    new.sum().backward()
    assert sum(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in policy.trainable()) > 0


@pytest.mark.parametrize("detach", [False, True])
def test_the_gradient_of_the_prediction_equals_finite_differences(pipelines, make_config, family, detach):
    """Along the gradient, where the slope is not small; a detached unconditional branch leaves its share out."""
    sections = {"cfg": 2.0, "detach_unconditional": detach}
    policy = policy_of(pipelines[family], make_config, rollout=sections, lora={"targets": "all"})
    generator = torch.Generator().manual_seed(0)
    for p in policy.trainable():
        p.data = 0.1 * torch.randn(p.shape, generator=generator)
    condition = policy.encode(PROMPTS)
    x = torch.randn(2, *policy.latent_shape, generator=generator)
    probe = torch.randn(x.shape, generator=generator)
    out = policy.predict(x, 500, condition)
    grads = torch.autograd.grad((out * probe).sum(), policy.trainable(), materialize_grads=True)
    slope = math.sqrt(sum(float(g.square().sum()) for g in grads))
    direction = [g / slope for g in grads]

    def moved(step):
        with torch.no_grad():
            for p, d in zip(policy.trainable(), direction, strict=True):
                p += step * d
            value = (policy.predict(x, 500, condition) * probe).sum(dtype=torch.float64)
            for p, d in zip(policy.trainable(), direction, strict=True):
                p -= step * d
        return value

    h = 1e-2
    measured = (moved(h) - moved(-h)) / (2 * h)
    ratio = slope / float(measured)
    assert abs(ratio - 1) > 0.05 if detach else abs(ratio - 1) < 3e-3, ratio


def test_only_the_named_modules_get_a_lora(pipelines, make_config):
    """FLUX's last layer has a name that layers of its blocks end with."""
    pipeline = copy.deepcopy(pipelines["flux"])
    expected = {n for n in module_names(pipeline.transformer) if is_target(n, "attention")} | {"proj_out"}
    sections = {"rollout": tiny_pipelines.size(pipeline), "lora": {"targets": "attention"}}
    policy = DiffusersPolicy(pipeline, make_config("given", **sections), ["proj_out"])
    assert policy.lora().keys() == expected
    assert any(name.endswith(".proj_out") for name in policy.module_names())


@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_a_unets_usual_scheduler_does_not_change_the_trained_grid(pipelines, make_config, scheduler):
    other = copy.copy(pipelines["sdxl"])
    own = dict(other.scheduler.config)
    other.scheduler = getattr(diffusers, scheduler).from_config(own)
    ours, theirs = (policy_of(p, make_config).grid(5) for p in (other, pipelines["sdxl"]))
    assert torch.equal(ours.levels, theirs.levels) and torch.equal(ours.timesteps, theirs.timesteps)


def test_a_unets_own_timestep_spacing_is_trained(pipelines, make_config):
    """SDXL-Turbo's scheduler is one of Euler with trailing timesteps."""
    turbo = copy.copy(pipelines["sdxl"])
    turbo.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(
        turbo.scheduler.config, timestep_spacing="trailing"
    )
    expected = diffusers.DDIMScheduler(timestep_spacing="trailing")
    expected.set_timesteps(4)
    assert policy_of(turbo, make_config).adapter.grid(4).timesteps.tolist() == expected.timesteps.tolist()
    assert expected.timesteps.tolist() == [999, 749, 499, 249]
    assert policy_of(pipelines["sdxl"], make_config).grid(4).timesteps.tolist() == [751, 501, 251, 1]
    turbo.scheduler = diffusers.DDIMScheduler(timestep_spacing="linspace")
    assert policy_of(turbo, make_config).grid(4).timesteps.tolist() == [750, 500, 250, 0]


def test_v_prediction_is_converted_to_the_epsilon_that_made_x(pipelines, make_config):
    wiring = policy_of(pipelines["sd21"], make_config).adapter
    t = torch.tensor([21, 981])
    ab = wiring.alphas[t].view(-1, 1, 1, 1)
    x0, eps = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x, v = ab.sqrt() * x0 + (1 - ab).sqrt() * eps, ab.sqrt() * eps - (1 - ab).sqrt() * x0
    torch.testing.assert_close(wiring.epsilon(v, x, t), eps)


def test_a_model_that_predicts_the_sample_is_refused(pipelines, make_config):
    other = copy.copy(pipelines["sd15"])
    other.scheduler = tiny_pipelines.ddim("sample")
    with pytest.raises(ConfigError, match="the model predicts sample"):
        policy_of(other, make_config)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.EDMEulerScheduler(),
        diffusers.FlowMatchEulerDiscreteScheduler(),
        diffusers.UniPCMultistepScheduler(use_flow_sigmas=True),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_unet_with_a_scheduler_of_other_noise_levels_is_refused(pipelines, make_config, scheduler):
    other = copy.copy(pipelines["sdxl"])
    other.scheduler = scheduler
    with pytest.raises(ConfigError, match=f"scheduler is {type(scheduler).__name__} without DDPM's betas"):
        policy_of(other, make_config)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_grid_leaves_the_pipelines_scheduler_as_it_is(pipelines, make_config, family):
    policy = policy_of(pipelines[family], make_config)
    before = policy.pipeline.scheduler.sigmas.clone()
    policy.grid(3)
    assert torch.equal(policy.pipeline.scheduler.sigmas, before)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_flow_model_with_another_scheduler_needs_a_shift(pipelines, make_config, family):
    other = copy.copy(pipelines[family])
    other.scheduler = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    with pytest.raises(ConfigError, match=r"scheduler is UniPCMultistepScheduler, but .* Set rollout\.shift"):
        policy_of(other, make_config).grid(3)
    shifted = policy_of(other, make_config, rollout={"shift": 2.0}).grid(3)
    assert torch.equal(shifted.levels, flow_grid(3, 2.0).levels)


def test_sdxl_is_told_the_size_of_the_picture(pipelines, make_config):
    policy = policy_of(pipelines["sdxl"], make_config, rollout={"height": 32, "width": 24})
    assert policy.latent_shape == (4, 16, 12)
    assert policy.encode(["a"]).positive["time_ids"].tolist() == [[32, 24, 0, 0, 32, 24]]


def test_flux_is_told_its_guidance(pipelines, make_config):
    outs = []
    for guidance in (1.0, 3.5):
        policy = policy_of(pipelines["flux"], make_config, rollout={"guidance": guidance})
        x = torch.ones(1, *policy.latent_shape)
        with torch.no_grad():
            outs.append(policy.predict(x, 500, policy.encode(["a"])))
    assert not torch.equal(*outs)


def test_the_shift_follows_the_resolution_as_flux_has_it():
    config = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    assert resolution_mu((16, 32, 32), 2, config) == pytest.approx(0.5)
    assert resolution_mu((16, 128, 128), 2, config) == pytest.approx(1.15)
    assert resolution_mu((16, 128, 128), 2, {"use_dynamic_shifting": False}) is None


def test_a_shift_of_ones_own_gives_the_ideal_grid(pipelines, make_config):
    grid = policy_of(pipelines["flux"], make_config, rollout={"shift": 3.0}).grid(16)
    assert torch.equal(grid.levels, flow_grid(16, 3.0).levels)
    with pytest.raises(ConfigError, match=r"rollout.shift is 3, but only flow models"):
        policy_of(pipelines["sd15"], make_config, rollout={"shift": 3.0})


def test_packing_is_undone_by_unpacking():
    x = torch.arange(2.0 * 4 * 6 * 8).view(2, 4, 6, 8)
    assert pack(x).shape == (2, 12, 16)
    assert torch.equal(unpack(pack(x), 3, 4), x)


def test_a_size_that_is_no_multiple_is_refused(pipelines, make_config, family):
    multiple = 32 if family == "qwen-image-2.1" else 2 if family in UNETS else 4
    message = f"rollout.height 17 is not a multiple of {multiple}. Use one, such as {max(16, multiple)}"
    with pytest.raises(ConfigError, match=message):
        policy_of(pipelines[family], make_config, rollout={"height": 17})


def test_chroma_is_only_sharded_where_all_processes_make_the_same_model_calls(pipelines, make_config):
    """Images share a call where their texts have one length, which differs between processes."""
    one = {"images_at_once": 1, "cfg": 2.0, "batch_cfg": False}
    policy_of(pipelines["chroma"], make_config, model={"shard": True}, rollout=one)
    for changed in ({"images_at_once": 2}, {"batch_cfg": True}):
        with pytest.raises(ConfigError, match=r"model\.shard with Chroma needs rollout\.images_at_once = 1"):
            policy_of(pipelines["chroma"], make_config, model={"shard": True}, rollout={**one, **changed})


def test_a_pipeline_without_an_entry_is_refused(pipelines, make_config):
    other = diffusers.StableDiffusionImg2ImgPipeline(**pipelines["sd15"].components, requires_safety_checker=False)
    supported = ", ".join(FAMILIES)
    with pytest.raises(ConfigError, match=f"Img2ImgPipeline is not a supported pipeline. Supported are {supported}"):
        policy_of(other, make_config)


def test_every_family_has_its_layers_among_the_targets(pipelines, family):
    """Attention and feed-forward of every block, and not the layers around the blocks."""
    core = getattr(pipelines[family], "unet", None) or pipelines[family].transformer
    names = [name for name, module in core.named_modules() if isinstance(module, torch.nn.Linear)]
    ends = (".to_q", ".to_out.0", ".net.0.proj", ".net.2", ".proj_mlp", ".feed_forward.w1")
    assert all(is_target(name, "linear") for name in names if name.endswith(ends))
    assert not any(is_target(name, "all") for name in names if "embed" in name or name == "proj_out" or "adaLN" in name)
    single = [name for name in names if name.startswith("single_transformer_blocks.") and name.endswith("proj_out")]
    assert all(is_target(name, "linear") and not is_target(name, "attention") for name in single)
    assert bool(single) == (family in ("flux", "chroma"))
