"""The nodes in a ComfyUI host in this process."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
import comfy_host

comfy_host.skip_without_host()

import torch  # noqa: E402

NODES = comfy_host.load_pack()
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402

steps = comfy_host.pack_module("nodes.steps")
space = comfy_host.pack_module("nodes.space")
irg = comfy_host.pack_module("nodes.irg")
types = comfy_host.pack_module("nodes.types")
from comfyui_pcpo.tiny import pipelines  # noqa: E402

ConfigError = comfy_host.pack_module("trainer.config").ConfigError


def run(node, *args, **kwargs):
    """What the host does: validated values in, outputs back, under inference mode."""
    with torch.inference_mode():
        return NODES[node].execute(*args, **kwargs).result


@pytest.fixture(scope="module", params=["emoji-flow", "emoji-eps"])
def tiny(request):
    return Tiny(request.param)


@pytest.fixture(scope="module")
def flow():
    return Tiny("emoji-flow")


class Tiny:
    def __init__(self, name):
        self.name = name
        self.model, self.clip, self.vae = run("PCPOLoadTinyModel", name)
        self.positive, self.negative = self.encode("a red fox"), self.encode("")
        self.pipeline = pipelines.load_tiny(name, pipelines.MODELS)

    def encode(self, text):
        with torch.inference_mode():
            return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def latent(self, count=2):
        return {"samples": torch.zeros(count, 16, 8, 8)}

    def stock(self, sigmas, model=None, seed=3, cfg=1.0, latent=None, **kwargs):
        """ComfyUI's own deterministic sampler."""
        samples = (latent or self.latent())["samples"]
        noise = comfy.sample.prepare_noise(samples, seed)
        with torch.inference_mode():
            return comfy.sample.sample_custom(
                model or self.model, noise, cfg, comfy.samplers.sampler_object("euler"), sigmas, self.positive,
                self.negative, samples, seed=seed, disable_pbar=True, **kwargs,
            )  # fmt: skip

    def ours(self, sigmas, choice, model=None, seed=3, cfg=1.0, latent=None, **kwargs):
        samples = (latent or self.latent())["samples"]
        noise = comfy.sample.prepare_noise(samples, seed)
        with torch.inference_mode():
            return comfy.sample.sample_custom(
                model or self.model, noise, cfg, steps.StochasticSampler(choice), sigmas, self.positive,
                self.negative, samples, seed=seed, disable_pbar=True, **kwargs,
            )  # fmt: skip

    def sigmas(self, scheduler="normal", count=8):
        return comfy.samplers.calculate_sigmas(self.model.get_model_object("model_sampling"), scheduler, count)


def biggest(a, b):
    return (a.float() - b.float()).abs().max().item()


def lora_on(tiny, seed, size=0.05, strength=1.0):
    """A random LoRA loaded by the host's own node."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    core = tiny.pipeline.unet if tiny.name == "emoji-eps" else tiny.pipeline.transformer
    for name, module in core.named_modules():
        if name.endswith(("to_q", "to_v", "to_out.0", "ff.net.2")):
            a = torch.randn(4, module.in_features, generator=generator) * size
            b = torch.randn(module.out_features, 4, generator=generator) * size
            pairs[name] = (a, b)
    from comfyui_pcpo.lora import export_state, family_of

    state = export_state(pairs, 4.0, 4, "comfyui", family_of(pairs))
    return run("LoraModelLoader", tiny.model, state, strength)[0]


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
    z = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = (tiny.pipeline.vae.decode(z).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        picture = tiny.vae.decode(z)
        assert biggest(picture, expected) < 1e-5
        encoded = tiny.pipeline.vae.encode(expected.permute(0, 3, 1, 2) * 2 - 1).latents
        assert biggest(tiny.vae.encode(picture), encoded) < 1e-4


def test_deterministic_sample_equals_the_diffusers_pipeline(tiny):
    count = 8
    noise = comfy.sample.prepare_noise(tiny.latent()["samples"], 3)
    pipe = tiny.pipeline
    pipe.set_progress_bar_config(disable=True)
    extra = {"eta": 0.0} if tiny.name == "emoji-eps" else {"max_sequence_length": 0}
    expected = pipe(
        ["a red fox"] * 2, num_inference_steps=count, guidance_scale=4.0, latents=noise, output_type="latent",
        height=64, width=64, **extra,
    ).images  # fmt: skip
    found = run(
        "PCPOKSampler",
        tiny.model,
        3,
        count,
        4.0,
        "training",
        tiny.positive,
        tiny.negative,
        tiny.latent(),
        1.0,
        "auto",
        0.0,
    )[0]["samples"]
    assert biggest(found, expected) < 1e-4


@pytest.mark.parametrize("scheduler", ["normal", "simple", "karras"])
def test_noise_level_0_equals_the_stock_deterministic_sampler(tiny, scheduler):
    sigmas = tiny.sigmas(scheduler)
    found = tiny.ours(sigmas, steps.StepChoice(noise_level=0.0), cfg=3.0)
    expected = tiny.stock(sigmas, cfg=3.0)
    assert biggest(found, expected) < 1e-4 * expected.abs().max().item()


def test_same_seed_is_the_same_picture_and_another_is_not(tiny):
    sigmas, choice = tiny.sigmas(), steps.StepChoice()
    first = tiny.ours(sigmas, choice)
    assert torch.equal(first, tiny.ours(sigmas, choice))
    assert biggest(first, tiny.ours(sigmas, choice, seed=4)) > 0.1


def test_mask_keeps_the_rest_of_the_latent(tiny):
    latent = {"samples": torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))}
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 32:] = 1
    for scheduler in ("training", "normal"):
        found = run(
            "PCPOKSampler", tiny.model, 3, 6, 1.0, scheduler, tiny.positive, tiny.negative,
            {**latent, "noise_mask": mask}, 1.0, "auto", -1.0,
        )[0]["samples"]  # fmt: skip
        assert biggest(found[..., :4], latent["samples"][..., :4]) < 1e-4
        assert biggest(found[..., 4:], latent["samples"][..., 4:]) > 0.1


def test_denoise_below_1_stays_near_the_latent(tiny):
    start = {"samples": tiny.stock(tiny.sigmas())[:1]}
    change = [
        biggest(start["samples"], run(
            "PCPOKSampler", tiny.model, 3, 4, 1.0, "normal", tiny.positive, tiny.negative, start, d, "auto", -1.0
        )[0]["samples"]) for d in (0.15, 1.0)
    ]  # fmt: skip
    assert 0 < change[0] < change[1]


def test_trajectory_equals_the_trainers(tiny):
    """The recorded noises, replayed through the trainer's own rollout on diffusers' model."""
    from comfyui_pcpo.rollout import rollout

    config = comfy_host.pack_module("trainer.config").build(
        {"model": {"name": tiny.name}, "rollout": {"cfg": 3.0, "steps": 6}}, "test"
    )
    policy = comfy_host.pack_module("trainer.diffusers_policy").DiffusersPolicy(
        pipelines.load_tiny(tiny.name, pipelines.MODELS), config
    )
    found = run(
        "PCPOKSampler",
        tiny.model,
        3,
        6,
        3.0,
        "training",
        tiny.positive,
        tiny.negative,
        tiny.latent(),
        1.0,
        "auto",
        -1.0,
    )[1]

    class Replay:
        def __init__(self):
            self.rest = [found.path.latents[0], *found.path.noises]

        def next(self):
            return self.rest.pop(0)

        first = next

    condition = policy.encode(["a red fox"]).rows([0, 0])
    path = rollout(
        lambda x, t, rows: policy.predict(x, t, condition), policy.grid(6), found.path.transitions, Replay(),
        [torch.arange(2)],
    )  # fmt: skip
    assert [t.std for t in found.path.transitions] == pytest.approx(
        [t.std for t in steps.StepChoice().transitions(policy.grid(6))], rel=1e-5
    )
    assert biggest(found.path.latents, path.latents) < 1e-4
    assert found.log_probs.shape == (6, 2)


def test_log_probs_are_those_of_a_normal_distribution(tiny):
    from comfyui_pcpo.transition import mean

    found = run(
        "PCPOKSampler",
        tiny.model,
        3,
        5,
        1.0,
        "training",
        tiny.positive,
        tiny.negative,
        tiny.latent(),
        1.0,
        "auto",
        -1.0,
    )[1]
    path = found.path
    for i, step in enumerate(path.transitions):
        drawn = mean(path.latents[i], path.outs[i], step) + step.std * path.noises[i]
        normal = torch.distributions.Normal(mean(path.latents[i], path.outs[i], step), step.std)
        assert torch.allclose(found.log_probs[i], normal.log_prob(drawn).flatten(1).mean(1), atol=1e-3)
        assert torch.allclose(drawn, path.latents[i + 1], atol=1e-4)


def irg_sample(tiny, aligned, cfg=3.0, base=None):
    guider = irg.IRGGuider(base or tiny.model, aligned)
    guider.set_conds(tiny.positive, tiny.negative)
    guider.set_cfg(cfg)
    samples = tiny.latent()["samples"]
    sampler = comfy.samplers.sampler_object("euler")
    with torch.inference_mode():
        return guider.sample(
            comfy.sample.prepare_noise(samples, 3), samples, sampler, tiny.sigmas(), seed=3, disable_pbar=True
        )


def aligned(model, weight, start=0.0, end=1.0):
    from comfyui_pcpo.guidance import ImplicitReward

    return types.Aligned(model, ImplicitReward(weight, start, end))


def test_weight_0_is_the_base_and_1_the_aligned_model(tiny):
    lora = lora_on(tiny, 1)
    base, alone = tiny.stock(tiny.sigmas(), cfg=3.0), tiny.stock(tiny.sigmas(), lora, cfg=3.0)
    assert biggest(base, alone) > 1e-2
    assert torch.equal(irg_sample(tiny, [aligned(lora, 0.0)]), base)
    assert biggest(irg_sample(tiny, [aligned(lora, 1.0)]), alone) < 1e-4


def test_two_loras_on_one_base_do_not_cancel_and_equal_a_sum_by_hand(tiny):
    """One step, so that the composition can be written down: x0 is linear in what the models say."""
    first, second = lora_on(tiny, 1), lora_on(tiny, 2)
    sigmas = torch.tensor([tiny.sigmas()[2], 0.0])
    base, one, two = (tiny.stock(sigmas, m, cfg=3.0) for m in (None, first, second))
    guider = irg.IRGGuider(tiny.model, [aligned(first, 1.5), aligned(second, -0.5)])
    guider.set_conds(tiny.positive, tiny.negative)
    guider.set_cfg(3.0)
    samples = tiny.latent()["samples"]
    with torch.inference_mode():
        found = guider.sample(
            comfy.sample.prepare_noise(samples, 3), samples, comfy.samplers.sampler_object("euler"), sigmas, seed=3
        )
    expected = base + 1.5 * (one - base) - 0.5 * (two - base)
    assert biggest(found, expected) < 1e-5 * max(1.0, expected.abs().max().item())
    assert biggest(found, base) > 1e-3


def test_different_checkpoints_compose_and_are_left_as_they_were(flow):
    other = NODES["PCPOLoadTinyModel"].execute("emoji-flow").result[0]
    with torch.inference_mode(False), torch.no_grad():
        for p in other.model.diffusion_model.parameters():
            p.mul_(0.98)
    alone = flow.stock(flow.sigmas(), other, cfg=3.0)
    assert torch.equal(irg_sample(flow, [aligned(other, 1.0)]), alone)
    half = irg_sample(flow, [aligned(other, 0.5), aligned(lora_on(flow, 1), 0.5)])
    assert biggest(half, alone) > 1e-3
    assert torch.equal(flow.stock(flow.sigmas(), other, cfg=3.0), alone)


def test_a_window_ends_the_guidance(flow):
    lora = lora_on(flow, 1)
    base, whole = flow.stock(flow.sigmas(), cfg=3.0), irg_sample(flow, [aligned(lora, 2.0)])
    early = irg_sample(flow, [aligned(lora, 2.0, 0.0, 0.5)])
    assert biggest(early, base) > 1e-3
    assert biggest(early, whole) > 1e-4


def test_base_with_a_lora_of_its_own_composes_with_more(flow):
    base = lora_on(flow, 1)
    flow_on_base = Tiny.__new__(Tiny)
    flow_on_base.__dict__.update(flow.__dict__, model=base)
    both = lora_on(flow_on_base, 2)
    assert biggest(irg_sample(flow, [aligned(both, 1.0)], base=base), flow.stock(flow.sigmas(), both, cfg=3.0)) < 1e-4


def test_guidance_refuses_what_it_cannot_tell_apart(flow):
    lora = lora_on(flow, 1)
    with pytest.raises(ConfigError, match="0 patches beyond the base"):
        irg.IRGGuider(flow.model, [aligned(flow.model.clone(), 1.0)])
    with pytest.raises(ConfigError, match="does not start from the base"):
        irg.IRGGuider(lora, [aligned(flow.model, 1.0)])
    bypass = run("LoraModelLoader", flow.model, {}, 1.0)[0]
    bypass.set_injections("bypass_lora", [])
    with pytest.raises(ConfigError, match="bypass"):
        irg.IRGGuider(flow.model, [aligned(bypass, 1.0)])


def test_scores_put_the_best_first():
    reward = run("PCPOLoadReward", "redness")[0]
    images = torch.zeros(3, 64, 64, 3)
    images[1, ..., 0] = 1.0
    images[2, ..., 0] = 0.5
    best, scores, report, grid = run("PCPOScoreImages", images, reward, "", 2)
    assert torch.equal(best, images[[1, 2]])
    assert scores == sorted(scores, reverse=True) and len(scores) == 2
    assert report.count("\n") == 3 and grid.shape[0] == 1


def test_combined_rewards_add_up_and_refuse_repeats():
    a, b = run("PCPOLoadReward", "redness")[0], run("PCPOLoadReward", "colorfulness")[0]
    both = run("PCPOCombineRewards", a, 2.0, b, -1.0)[0]
    images = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    parts = [r.combined().score(images, ["", ""]).total for r in (a, b)]
    assert torch.allclose(both.combined().score(images, ["", ""]).total, 2 * parts[0] - parts[1])
    with pytest.raises(ValueError, match="each may come once"):
        run("PCPOCombineRewards", both, 1.0, a, 1.0)


def test_prompts_refuse_an_empty_list(flow):
    assert run("PCPOPrompts", flow.clip, "a fox\n\n# no\n a frog ")[0].lines == ("a fox", "a frog")
    with pytest.raises(ConfigError, match="0 prompts"):
        run("PCPOPrompts", flow.clip, " \n# nothing")


def test_plot_credit_refuses_a_grid_without_noise(flow):
    image, report = run("PCPOPlotCredit", flow.model, 8, "auto", -1.0, "proportionate")
    assert image.shape[0] == 1 and report.count("\n") == 8
    with pytest.raises(ConfigError, match="0 of 8 steps"):
        run("PCPOPlotCredit", flow.model, 8, "auto", 0.0, "proportionate")


def test_guidance_by_two_models_costs_at_most_three_plain_steps(flow):
    """(K + 1) x 1.1 of plain CFG, in processor time: the median of several runs of each."""
    pair = [aligned(lora_on(flow, 1), 1.5), aligned(lora_on(flow, 2), 0.5)]
    guider = irg.IRGGuider(flow.model, pair)
    guider.set_conds(flow.positive, flow.negative)
    guider.set_cfg(3.0)
    samples = flow.latent(16)
    sampler, sigmas = comfy.samplers.sampler_object("euler"), flow.sigmas()
    noise = comfy.sample.prepare_noise(samples["samples"], 3)

    def guided():
        with torch.inference_mode():
            guider.sample(noise, samples["samples"], sampler, sigmas, seed=3, disable_pbar=True)

    plain, cost = (
        sorted(processor_seconds(work) for _ in range(5))[2]
        for work in (lambda: flow.stock(sigmas, cfg=3.0, latent=samples), guided)
    )
    assert cost < 3 * 1.1 * plain


def processor_seconds(work):
    start = time.process_time()
    work()
    return time.process_time() - start


def test_schemas_are_those_of_the_golden_file():
    """Ids never change and inputs are only appended; a change on purpose goes into the file."""
    golden = json.loads((comfy_host.PACK / "tests/golden/nodes.json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps(comfy_host.schemas())) == golden


def test_english_texts_are_the_schemas():
    texts = json.loads((comfy_host.PACK / "locales/en/nodeDefs.json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps(comfy_host.texts())) == texts


def test_the_pack_does_nothing_where_comfyui_does_not_load_it():
    import importlib.util

    spec = importlib.util.spec_from_file_location("a_test_runner", comfy_host.PACK / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "comfy_entrypoint" not in vars(module)


def test_loading_the_pack_imports_nothing_heavy():
    code = (
        "import sys; sys.path.insert(0, HOST)\n"
        "import comfy.cli_args; comfy.cli_args.args.cpu = True\n"
        "import asyncio, nodes, comfy.sd, comfy_api.latest\n"
        "before = set(sys.modules)\n"
        "assert asyncio.run(nodes.load_custom_node(PACK))\n"
        "new = {n.split('.')[0] for n in set(sys.modules) - before}\n"
        "print(sorted(new & {'diffusers', 'open_clip', 'peft', 'accelerate', 'tensorboard', 'matplotlib'}))\n"
    )
    code = f"HOST, PACK = {comfy_host.COMFYUI!r}, {str(comfy_host.PACK)!r}\n" + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr[-2000:]
