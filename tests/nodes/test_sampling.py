"""The embedded models and the sampling nodes, in process."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "support"))
import comfy_host

comfy_host.skip_without_host()

import comfy_families  # noqa: E402
import comfy_models  # noqa: E402
import torch  # noqa: E402
from comfy_models import biggest, steps  # noqa: E402

from comfyui_pcpo.method.rollout import rollout  # noqa: E402
from comfyui_pcpo.method.transition import mean  # noqa: E402
from comfyui_pcpo.tiny import pipelines  # noqa: E402

pytestmark = pytest.mark.slow

presets = comfy_host.pack_module("nodes.host.presets")
ConfigError = comfy_host.pack_module("trainer.config.schema").ConfigError


@pytest.fixture(scope="module", params=pipelines.EMBEDDED)
def tiny(request):
    return comfy_models.Tiny(request.param)


@pytest.fixture(scope="module")
def flow():
    return comfy_models.Tiny("emoji-flow")


def half_mask():
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 32:] = 1
    return mask


def drawn(seed=0, count=1):
    return torch.randn(count, 16, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_text_encoder_equals_transformers(tiny):
    pipe, text = tiny.pipeline, "a red fox"
    if tiny.name == "emoji-eps":
        expected = pipe.encode_prompt([text], "cpu", 1, False)[0]
    else:
        expected, _, pooled, _ = pipe.encode_prompt(
            [text], None, None, device="cpu", do_classifier_free_guidance=False, max_sequence_length=0
        )
        assert biggest(tiny.positive[0][1]["pooled_output"], pooled) < 1e-5
    assert biggest(tiny.positive[0][0], expected) < 1e-5


def test_autoencoder_equals_diffusers(tiny):
    z = drawn(count=2)
    with torch.inference_mode():
        expected = (tiny.pipeline.vae.decode(z).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        image = tiny.vae.decode(z)
        assert biggest(image, expected) < 1e-5
        encoded = tiny.pipeline.vae.encode(expected.permute(0, 3, 1, 2) * 2 - 1).latents
        assert biggest(tiny.vae.encode(image), encoded) < 1e-4


@pytest.mark.parametrize("side", [8, 16])
def test_deterministic_sample_equals_the_diffusers_pipeline(tiny, side):
    latent = tiny.latent(side=side)
    noise = comfy_models.comfy.sample.prepare_noise(latent["samples"], 3)
    tiny.pipeline.set_progress_bar_config(disable=True)
    extra = {"eta": 0.0} if tiny.name == "emoji-eps" else {"max_sequence_length": 0}
    expected = tiny.pipeline(
        ["a red fox"] * 2, num_inference_steps=8, guidance_scale=4.0, latents=noise, output_type="latent",
        height=8 * side, width=8 * side, **extra,
    ).images  # fmt: skip
    result = tiny.ksample(steps=8, cfg=4.0, noise_level=0.0, latent_image=latent)[0]
    assert biggest(result, expected) < 1e-4 * expected.abs().max().item()


@pytest.mark.parametrize("scheduler", ["normal", "simple", "karras"])
def test_noise_level_0_equals_the_stock_deterministic_sampler(tiny, scheduler):
    sigmas = tiny.sigmas(scheduler)
    result, expected = tiny.ours(steps.StepChoice(noise_level=0.0), sigmas, cfg=3.0), tiny.stock(sigmas)
    bound = 2e-5 if (tiny.name, scheduler) == ("emoji-eps", "karras") else 1e-5  # rounding: 1.5e-5, else below 1e-5
    assert biggest(result, expected) < bound * expected.abs().max().item()


def test_one_sigma_is_no_step_as_in_comfyuis_samplers(tiny):
    """The high half of SplitSigmas at step 0, its default."""
    sigmas = tiny.sigmas()[:1]
    assert torch.equal(tiny.ours(steps.StepChoice(), sigmas), tiny.stock(sigmas, cfg=1.0))


def test_the_same_seed_gives_the_same_image_and_another_does_not(tiny):
    first = tiny.ours(steps.StepChoice())
    assert torch.equal(first, tiny.ours(steps.StepChoice()))
    assert biggest(first, tiny.ours(steps.StepChoice(), seed=4)) > 0.1


@pytest.mark.parametrize("scheduler", ["training", "normal"])
@pytest.mark.parametrize("denoise", [1.0, 0.6])
def test_mask_keeps_the_rest_of_the_latent(tiny, scheduler, denoise):
    start = drawn(count=2)
    result, path = tiny.ksample(
        latent_image={"samples": start, "noise_mask": half_mask()}, scheduler=scheduler, denoise=denoise
    )
    assert biggest(result[..., :4], start[..., :4]) < 1e-4
    assert biggest(result[..., 4:], start[..., 4:]) > 0.1
    assert path.path.latents.shape[:2] == (7, 2)


def test_denoise_below_1_stays_near_the_latent(tiny):
    start = tiny.stock()[:1]
    change = [
        biggest(start, tiny.ksample(latent_image={"samples": start}, steps=4, denoise=d, scheduler="normal")[0])
        for d in (0.15, 1.0)
    ]
    assert 0 < change[0] < change[1]


def test_a_batch_equals_its_single_images_and_they_differ(tiny):
    """The host's batch_index selects the noise of one image of a batch."""
    both = tiny.ksample(noise_level=0.0)[0]
    second = tiny.ksample(noise_level=0.0, latent_image={**tiny.latent(1), "batch_index": [1]})[0]
    assert biggest(both[1:], second) < 1e-4
    noisy = tiny.ksample(latent_image=tiny.latent(3))[0]
    assert len(noisy) == 3 and min(biggest(noisy[i], noisy[j]) for i, j in ((0, 1), (1, 2), (0, 2))) > 0.1


def test_sampler_in_sampler_custom_advanced_equals_the_ksampler(tiny):
    call = comfy_host.execute
    sampler = call("PCPOSampler", "auto", -1.0)[0]
    noise = call("RandomNoise", 3)[0]
    sigmas = call("BasicScheduler", tiny.model, "normal", 6, 1.0)[0]
    start = {"samples": drawn(count=2), "noise_mask": half_mask()}
    for latent in (tiny.latent(), start):
        result, denoised = call("SamplerCustomAdvanced", noise, tiny.guider(), sampler, sigmas, latent)
        expected = tiny.ksample(cfg=3.0, scheduler="normal", latent_image=latent)[0]
        assert torch.equal(result["samples"], expected)
        assert denoised["samples"].shape == expected.shape


def test_every_step_sends_a_preview_of_its_prediction(tiny):
    from comfy.cli_args import LatentPreviewMethod, args
    from comfy.utils import set_progress_bar_global_hook

    seen, before = [], args.preview_method
    args.preview_method = LatentPreviewMethod.Latent2RGB
    set_progress_bar_global_hook(lambda value, total, preview, **_: seen.append((value, total, preview)))
    try:
        tiny.ksample(noise_level=0.0)
    finally:
        args.preview_method = before
        set_progress_bar_global_hook(None)
    assert [value for value, _, _ in seen] == [1, 2, 3, 4, 5, 6]
    first, last = seen[0][2][1], seen[-1][2][1]
    assert first.size == last.size == (8, 8) and first.tobytes() != last.tobytes()


def test_trajectory_equals_the_trainers(tiny):
    """Replay the recorded noises through the trainer's rollout on the diffusers model."""
    config = comfy_host.pack_module("trainer.config.loading").build(
        {"model": {"name": tiny.name}, "rollout": {"cfg": 3.0, "steps": 6}}, "test"
    )
    policy = comfy_host.pack_module("trainer.policy.diffusers_policy").DiffusersPolicy(
        pipelines.load_tiny(tiny.name, pipelines.MODELS), config
    )
    result = tiny.ksample(cfg=3.0)[1]

    class Replay:
        count = 2

        def __init__(self):
            self.rest = [result.path.latents[0], *result.path.noises]

        def next(self):
            return self.rest.pop(0)

        first = next

    condition = policy.encode(["a red fox"]).rows([0, 0])
    path = rollout(
        lambda x, t, rows: policy.predict(x, t, condition), policy.grid(6), result.path.transitions, Replay(),
        [torch.arange(2)],
    )  # fmt: skip
    assert [t.std for t in result.path.transitions] == pytest.approx(
        [t.std for t in steps.StepChoice().transitions(policy.grid(6))], rel=1e-5
    )
    assert biggest(result.path.latents, path.latents) < 1e-4
    assert result.log_probs.shape == (6, 2)


def test_log_probs_are_those_of_a_normal_distribution(tiny):
    result = tiny.ksample(steps=5)[1]
    path = result.path
    for i, step in enumerate(path.transitions):
        middle = mean(path.latents[i], path.outs[i], step)
        at = middle + step.std * path.noises[i]
        expected = torch.distributions.Normal(middle, step.std).log_prob(at).flatten(1).mean(1)
        assert torch.allclose(result.log_probs[i], expected, atol=1e-3)
        assert torch.allclose(at, path.latents[i + 1], atol=1e-4)


@pytest.mark.parametrize(("name", "method"), [("emoji-eps", "flow_sde"), ("emoji-flow", "ddim")])
def test_a_method_for_the_other_kind_of_model_is_refused(name, method):
    with pytest.raises((ConfigError, ValueError), match=method):
        comfy_models.Tiny(name).ksample(method=method)


def test_plot_credit_refuses_a_grid_without_noise(flow):
    image, report = comfy_host.execute("PCPOPlotCredit", flow.model, 8, "auto", -1.0, "proportionate")
    assert image.shape[0] == 1 and report.count("\n") == 9
    with pytest.raises(ConfigError, match="none of the 8 steps"):
        comfy_host.execute("PCPOPlotCredit", flow.model, 8, "auto", 0.0, "proportionate")


@pytest.mark.parametrize(
    ("family", "title"),
    [("flux", "flow_sde, noise level 0.9, 6 steps"), ("sdxl", "ddim, noise level 1, 30 steps")],
)
def test_plot_credit_shows_by_default_what_train_lora_trains(family, title):
    model = comfy_families.make(family).model
    _, report = comfy_host.execute("PCPOPlotCredit", model, 0, "auto", -1.0, "proportionate")
    assert report.startswith(title), report.splitlines()[0]


def test_more_steps_than_the_model_has_timesteps_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"20 steps at denoise 0.01 are the last of 2000, but the model has 1000"):
        comfy_models.Tiny("emoji-eps").ksample(steps=20, denoise=0.01)


def test_guidance_0_is_that_of_the_recipe_of_another_model():
    family = comfy_families.make("sdxl")
    assert presets.recipe(family.model).cfg == 5.0
    latent = {"samples": torch.zeros(1, 4, 8, 8)}
    positive, negative = family.prompts.positive[0], family.prompts.negative
    zero, five, one = (
        comfy_host.execute(
            *("PCPOKSampler", family.model, 3, 4, cfg, "training", positive, negative, latent, 1.0, "auto", -1.0)
        )[0]["samples"]
        for cfg in (0.0, 5.0, 1.0)
    )
    assert torch.equal(zero, five) and not torch.equal(zero, one)


def test_guidance_0_is_that_of_the_recipe():
    tiny = comfy_models.Tiny("emoji-eps")
    assert torch.equal(tiny.ksample(cfg=0.0)[0], tiny.ksample(cfg=1.0)[0])
    assert not torch.equal(tiny.ksample(cfg=0.0)[0], tiny.ksample(cfg=5.0)[0])
