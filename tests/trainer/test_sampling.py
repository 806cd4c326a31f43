"""Sampling and export: our sampler is diffusers' own, and a LoRA does elsewhere what it did in training."""

import pytest
import torch
from running import start_run
from safetensors.torch import load_file

from comfyui_pcpo.method.guidance import ImplicitReward
from comfyui_pcpo.method.rollout import GroupNoise, derive_seed, rollout
from comfyui_pcpo.method.samplers import deterministic, transitions
from comfyui_pcpo.tiny.align import PIXELS
from trainer.config.schema import ConfigError
from trainer.evaluation.images import sample_images
from trainer.evaluation.options import SamplingOptions
from trainer.evaluation.sampling import Draw, Guide, sample, sampling_policy, untrained_seed
from trainer.evaluation.source import on_this_computer, open_source, parse_guide, read_pairs
from trainer.policy.diffusers_policy import module_names, order_channels_last
from trainer.policy.families import denoiser_of
from trainer.policy.loading import load_pipeline, make_policy
from trainer.policy.lora_pairs import load_pairs
from trainer.runs.export import ExportOptions, export_lora
from trainer.runs.folder import RunFolder

pytestmark = pytest.mark.slow

PROMPT = "two foxes on a striped blue background"


def names_of(model):
    return module_names(denoiser_of(load_pipeline(model)))


@pytest.fixture
def trained(make_config, model) -> RunFolder:
    """A run whose LoRA moves the model plainly, with an alpha that is not the rank."""
    size = {"height": PIXELS, "width": PIXELS}  # at which the base model samples
    lora, optimizer = {"alpha": 1.0, "targets": "all"}, {"learning_rate": 0.03}
    config = make_config(model, rollout=size, lora=lora, optimizer=optimizer)
    folder, updates = start_run(config)
    list(updates)
    return folder


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_a_deterministic_sample_is_the_plain_diffusers_pipelines(make_config, model, cfg):
    """Euler for emoji-flow, DDIM with eta 0 for emoji-eps, from the same latents."""
    policy = make_policy(make_config(model, rollout={"cfg": cfg, "steps": 4}))
    condition = policy.encode([PROMPT, "a red star"])
    grid, noise = policy.grid(4), [1, 2]
    path = rollout(
        lambda x, t, rows: policy.predict(x, t, condition),
        grid,
        deterministic(grid),
        GroupNoise(noise, 1, policy.latent_shape),
        [torch.arange(2)],
    )
    extra = {"max_sequence_length": 0} if model == "emoji-flow" else {"eta": 0.0}
    pipeline = load_pipeline(model)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        [PROMPT, "a red star"],
        num_inference_steps=4,
        guidance_scale=cfg,
        latents=path.latents[0].clone(),
        output_type="latent",
        **extra,
    ).images
    torch.testing.assert_close(path.final, theirs, rtol=1e-4, atol=1e-4)


def outputs(policy, x):
    """What the policy predicts with and without its LoRA."""
    condition = policy.encode([PROMPT])
    with torch.no_grad():
        new = policy.predict(x, 500, condition)
        with policy.reference():
            return new, policy.predict(x, 500, condition)


@pytest.mark.parametrize("layout", ["comfyui", "diffusers", "kohya"])
def test_an_exported_lora_reloads_in_diffusers_as_the_trained_policy(trained, model, layout):
    if layout == "kohya" and model == "emoji-flow":
        pytest.skip("diffusers reads no kohya file of SD3")
    path = export_lora(trained.path, ExportOptions(layout))
    assert path == trained.path / f"lora-{layout}.safetensors"
    policy = make_policy(trained.config())
    policy.load_lora(load_pairs(trained.checkpoint() / "lora.safetensors"))
    x = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    expected, base = outputs(policy, x)
    assert (expected - base).abs().max() > 1e-2

    pipeline = load_pipeline(model)
    denoiser = pipeline.unet if model == "emoji-eps" else pipeline.transformer
    order_channels_last(denoiser)
    text = {k: v for k, v in policy.encode([PROMPT]).positive.items()}
    key = "sample" if model == "emoji-eps" else "hidden_states"

    def predict():
        with torch.no_grad():
            return denoiser(**{key: x, "timestep": torch.tensor([500.0])}, **text).sample

    torch.testing.assert_close(predict(), base, rtol=0, atol=0)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="run")
    torch.testing.assert_close(predict(), expected, rtol=1e-4, atol=1e-4)
    pipeline.set_adapters(["run"], [0.0])
    torch.testing.assert_close(predict(), base, rtol=0, atol=0)


def test_the_runs_own_lora_file_is_its_comfyui_export(trained):
    exported = load_file(export_lora(trained.path, ExportOptions()))
    own = load_file(trained.lora_file)
    assert own.keys() == exported.keys()
    assert all(torch.equal(own[key], exported[key]) for key in own)


@pytest.mark.parametrize("layout", ["comfyui", "diffusers", "kohya"])
def test_every_layout_reads_back_as_the_same_factors(trained, layout):
    given = open_source(str(export_lora(trained.path, ExportOptions(layout))))
    assert given.config == trained.config()
    pairs, expected = read_pairs(given.path, names_of(given.config.model.name)), trained.lora()
    assert pairs.keys() == expected.keys()
    for name, pair in expected.items():
        if not pair[1].any():  # in a fused file, such a part of a module has no factors of its own
            assert not pairs[name][1].any()
            continue
        for ours, theirs in zip(pair, pairs[name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_a_guide_of_weight_one_is_the_run_and_of_weight_zero_the_base(trained):
    file, run = trained.lora_file, str(trained.path)

    def picture(source, guides):
        return sample_images(source, SamplingOptions([PROMPT], guide=guides, steps=2, images=2)).tobytes()

    own = picture(run, [])
    assert picture(run, [f"{file}=1.0"]) == own
    assert picture(trained.config().model.name, [f"{run}=1.0"]) == own
    base = picture(trained.config().model.name, [])
    assert picture(run, [f"{file}=0"]) == base != own


def test_weight_zero_is_the_base_and_composition_adds_up(trained):
    config = trained.config()
    pairs = trained.lora()
    policy = sampling_policy(config, [pairs])

    def pictures(*weights):
        return sample(policy, [PROMPT], [Guide(pairs, ImplicitReward(w)) for w in weights], Draw(3, 2, each=2))

    base = pictures()
    assert torch.equal(pictures(0.0), base)
    assert torch.equal(pictures(0.0, 0.0), base)
    assert not torch.equal(pictures(1.0), base)
    torch.testing.assert_close(pictures(0.5, 0.5), pictures(1.0), rtol=0, atol=1e-3)


def test_noise_of_a_picture_depends_on_seed_and_place_alone(make_config, model):
    policy = sampling_policy(make_config(model), [])
    one, both = (sample(policy, prompts, [], Draw(1, 2, each=2)) for prompts in ([PROMPT], [PROMPT, "a fox"]))
    torch.testing.assert_close(one, both[:2], rtol=0, atol=1e-4)
    noisy = sample(policy, [PROMPT], [], Draw(1, 2, -1, 2))
    assert not torch.equal(noisy, one)
    assert derive_seed(1, 0) != derive_seed(1, 1)


@pytest.mark.parametrize("text", ["cats.safetensors", "cats.safetensors=much", "cats.safetensors=nan"])
def test_a_guide_without_a_weight_is_refused(text):
    with pytest.raises(ConfigError, match=r"is not LORA=WEIGHT"):
        parse_guide(text)


def test_a_lora_of_another_model_is_refused(make_config, trained, model):
    other = "emoji-eps" if model == "emoji-flow" else "emoji-flow"
    with pytest.raises(ConfigError):
        pairs = read_pairs(trained.lora_file, names_of(other))
        sample(sampling_policy(make_config(other), [pairs]), ["a"], [Guide(pairs, ImplicitReward(1))], Draw(0, 2))


def test_a_damaged_or_missing_lora_is_named(make_config, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(ConfigError, match=r"cut.safetensors is not an intact safetensors file"):
        open_source(str(tmp_path / "cut.safetensors"))
    with pytest.raises(ConfigError, match=r"gone.safetensors does not exist"):
        open_source(str(tmp_path / "gone.safetensors"))
    with pytest.raises(ConfigError, match=r"neither a run's folder"):
        open_source("nothing")


def test_noise_level_minus_one_samples_as_the_run_trained(make_config):
    """dance_sde at .15 by the run's configuration, not the kind's usual sampler."""
    own = {"method": "dance_sde", "noise_level": 0.15}
    policy = sampling_policy(make_config("emoji-flow", rollout=own), [])
    grid = policy.grid(2)
    path = transitions(grid, "dance_sde", 0.15)
    condition = policy.encode([PROMPT]).rows([0, 0])
    noise = GroupNoise([derive_seed(3, 0)], 2, policy.latent_shape)
    expected = rollout(lambda x, t, rows: policy.predict(x, t, condition), grid, path, noise, [torch.arange(2)])
    found = sample(policy, [PROMPT], [], Draw(3, 2, -1, 2))
    torch.testing.assert_close(found, policy.decode(expected.final), rtol=0, atol=0)


def test_a_runs_negative_prompt_is_its_own_unless_another_is_given(make_config):
    folder, updates = start_run(make_config(prompts={"negative": "a red star"}, rollout={"cfg": 4.0}))
    list(updates)

    def picture(negative):
        return sample_images(
            str(folder.path), SamplingOptions([PROMPT], negative=negative, steps=2, images=1)
        ).tobytes()

    assert picture(None) == picture("a red star") != picture("")


def test_noise_of_samples_is_none_that_a_run_trains_on():
    """A run draws its noise from (seed, update, group); one number less is the same as a 0 there."""
    trained = {derive_seed(0, update, group) for update in range(50) for group in range(8)}
    assert derive_seed(0, 3) in trained
    assert not trained & {derive_seed(untrained_seed(0), prompt) for prompt in range(50)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a computer without a GPU")
def test_a_run_of_a_gpu_can_be_sampled_without_one(make_config, tmp_path):
    config = make_config(model={"device": "cuda:3"}, reward={"device": "cuda"})
    opened = on_this_computer(config)
    assert (opened.model.device, opened.reward.device) == ("auto", "auto")
    assert on_this_computer(make_config(model={"device": "cpu"})).model.device == "cpu"
