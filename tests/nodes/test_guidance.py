"""Implicit reward guidance, in process: exactness, memory, cost, refusals."""

import copy
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "support"))
import comfy_host

comfy_host.skip_without_host()

comfy_host.load_pack()
import comfy.hooks  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import comfy_models  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from comfy.model_patcher import MemoryCounter  # noqa: E402
from comfy_extras.nodes_model_advanced import ModelSamplingSD3  # noqa: E402
from comfy_models import biggest, forget_loaded, lora_on, partly_loaded, random_lora  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from comfyui_pcpo.method.guidance import ImplicitReward  # noqa: E402
from comfyui_pcpo.tiny import pipelines  # noqa: E402

pytestmark = pytest.mark.slow

irg = comfy_host.pack_module("nodes.host.irg")
types = comfy_host.pack_module("nodes.types")
ConfigError = comfy_host.pack_module("trainer.config.schema").ConfigError


@pytest.fixture(scope="module", params=pipelines.EMBEDDED)
def tiny(request):
    return comfy_models.Tiny(request.param)


@pytest.fixture(scope="module")
def flow():
    return comfy_models.Tiny("emoji-flow")


def aligned(model, weight, start=0.0, end=1.0):
    return types.AlignedModel(model, ImplicitReward(weight, start, end))


def guider_on(tiny, models, base=None, cfg=3.0):
    guider = irg.IRGGuider(base or tiny.model, models)
    guider.set_conds(tiny.positive, tiny.negative)
    guider.set_cfg(cfg)
    return guider


def guided(tiny, models, sigmas=None, base=None, cfg=3.0):
    sigmas = tiny.sigmas() if sigmas is None else sigmas
    return comfy_models.sample(guider_on(tiny, models, base, cfg), sigmas, tiny.latent())


def another_checkpoint(tiny, factor):
    """The same architecture with other weights."""
    other = comfy_host.execute("PCPOLoadTinyModel", tiny.name)[0]
    with torch.inference_mode(False), torch.no_grad():
        for p in other.model.diffusion_model.parameters():
            p.mul_(factor)
    return other


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_weight_0_is_the_base_and_1_the_aligned_model(tiny, cfg):
    lora = lora_on(tiny, 1)
    base, alone = tiny.stock(cfg=cfg), tiny.stock(model=lora, cfg=cfg)
    assert biggest(base, alone) > 1e-2
    assert torch.equal(guided(tiny, [aligned(lora, 0.0)], cfg=cfg), base)
    assert torch.equal(guided(tiny, [aligned(lora, 1.0)], cfg=cfg), alone)
    assert torch.equal(tiny.stock(cfg=cfg), base)


def with_hook(tiny, conditioning, seed):
    """A conditioning with a LoRA hook, as Create Hook LoRA and Cond Set Props make it."""
    hooks = comfy.hooks.create_hook_lora(random_lora(tiny, seed), 1.0, 0.0)
    return comfy.hooks.set_hooks_for_conditioning(conditioning, hooks)


def test_a_lora_hook_on_one_conditioning_acts_on_the_aligned_model_as_well(flow):
    lora, hooked = lora_on(flow, 1), copy.copy(flow)
    hooked.positive = with_hook(flow, flow.positive, 3)
    alone = hooked.stock(model=lora)
    assert biggest(alone, flow.stock(model=lora)) > 1e-2
    assert biggest(guided(hooked, [aligned(lora, 1.0)]), alone) < 1e-5
    assert torch.equal(guided(hooked, [aligned(lora, 0.0)]), hooked.stock())
    with pytest.raises(ConfigError, match="LoRA hook"):
        guided(hooked, [aligned(another_checkpoint(flow, 0.98), 1.0)])


def test_a_function_in_place_of_comfyuis_prediction_is_called_for_every_model(flow):
    def doubled(args):
        names = ("model", "conds", "input", "sigma", "model_options")
        return [2 * out for out in comfy.samplers.calc_cond_batch(*(args[name] for name in names))]

    base = flow.model.clone()
    base.set_model_sampler_calc_cond_batch_function(doubled)
    lora, sigmas = lora_on(flow, 1, base), flow.sigmas()[[2, -1]]
    for weight, model in ((0.0, base), (1.0, lora)):
        assert torch.equal(guided(flow, [aligned(lora, weight)], sigmas, base), flow.stock(sigmas, model))


@pytest.mark.parametrize("level", [0, 2, 5])
def test_two_loras_on_one_base_do_not_cancel_and_equal_a_sum_by_hand(tiny, level):
    """A single step, whose x0 is linear in the predictions, so the sum can be computed by hand."""
    first, second = lora_on(tiny, 1), lora_on(tiny, 2)
    sigmas = torch.tensor([tiny.sigmas()[level], 0.0])
    base, one, two = (tiny.stock(sigmas, m).double() for m in (None, first, second))
    result = guided(tiny, [aligned(first, 1.5), aligned(second, -0.5)], sigmas)
    expected = base + 1.5 * (one - base) - 0.5 * (two - base)
    assert (result - expected).abs().max() < 1e-5
    assert biggest(result, base) > 1e-3


def test_different_checkpoints_compose_and_are_left_as_they_were(flow):
    other, lora, sigmas = another_checkpoint(flow, 0.98), lora_on(flow, 1), flow.sigmas()[[2, -1]]
    base, alone, patched = (flow.stock(sigmas, m).double() for m in (None, other, lora))
    assert torch.equal(guided(flow, [aligned(other, 1.0)], sigmas).double(), alone)
    result = guided(flow, [aligned(other, 0.5), aligned(lora, 0.75)], sigmas)
    assert (result - (base + 0.5 * (alone - base) + 0.75 * (patched - base))).abs().max() < 1e-5
    assert torch.equal(flow.stock(sigmas, other).double(), alone)


def test_a_window_of_weight_1_is_the_aligned_model_inside_and_the_base_outside(tiny):
    lora, sigmas = lora_on(tiny, 1), tiny.sigmas()
    result = guided(tiny, [aligned(lora, 1.0, 0.0, 0.5)])
    middle = tiny.stock(sigmas[:5], lora)
    guider = tiny.guider()
    with torch.inference_mode():
        rest = guider.sample(
            torch.zeros_like(middle), middle, comfy_models.comfy.samplers.sampler_object("euler"), sigmas[4:],
            disable_pbar=True, seed=3,
        )  # fmt: skip
    assert biggest(result, rest) < 1e-5 * rest.abs().max().item()
    assert biggest(result, tiny.stock(model=lora)) > 1e-4


def test_the_nodes_chain_and_the_ksampler_is_the_guider(flow):
    call = comfy_host.execute
    one = call("PCPOImplicitReward", lora_on(flow, 1), 1.5, 0.0, 0.5)[0]
    both = call("PCPOImplicitReward", lora_on(flow, 2), -0.5, 0.25, 1.0, one)[0]
    assert [a.reward.weight for a in both] == [1.5, -0.5]
    guider = call("PCPOIRGGuider", flow.model, both, flow.positive, flow.negative, 3.0)[0]
    sampler, noise = call("KSamplerSelect", "euler")[0], call("RandomNoise", 3)[0]
    sigmas = call("BasicScheduler", flow.model, "normal", 6, 1.0)[0]
    result = call("SamplerCustomAdvanced", noise, guider, sampler, sigmas, flow.latent())[0]["samples"]
    node = call(
        "PCPOIRGKSampler", flow.model, both, 3, 6, 3.0, "euler", "normal", flow.positive, flow.negative, flow.latent(),
        1.0,
    )[0]["samples"]  # fmt: skip
    assert torch.equal(result, node)
    models = [a.model for a in both]
    expected = guided(flow, [aligned(models[0], 1.5, 0.0, 0.5), aligned(models[1], -0.5, 0.25)], sigmas)
    assert torch.equal(node, expected)


def test_base_with_a_lora_of_its_own_composes_with_more(flow):
    base = lora_on(flow, 1)
    both = lora_on(flow, 2, base)
    assert torch.equal(guided(flow, [aligned(both, 1.0)], base=base), flow.stock(model=both))


def test_patches_of_every_kind_are_applied_as_comfyui_does(flow):
    """Here a merged difference of a weight and of a bias."""
    patched = flow.model.clone()
    name = "diffusion_model.joint_blocks.0.x_block.attn.proj."
    difference = {name + kind: ("diff", (torch.full_like(patched.model.state_dict()[name + kind], 0.02),)) for kind in
                  ("weight", "bias")}  # fmt: skip
    assert len(patched.add_patches(difference)) == 2
    alone = flow.stock(model=patched)
    assert biggest(alone, flow.stock()) > 1e-4
    assert torch.equal(guided(flow, [aligned(patched, 1.0)]), alone)


def test_without_room_the_weights_are_computed_at_every_step(tiny):
    models = [aligned(lora_on(tiny, 1), 1.5), aligned(lora_on(tiny, 2), 0.5)]
    guider = guider_on(tiny, models)
    guider.room = lambda noise: MemoryCounter(0)
    assert torch.equal(comfy_models.sample(guider, tiny.sigmas(), tiny.latent()), guided(tiny, models))


def test_a_partly_loaded_base_composes(flow):
    forget_loaded()
    base = partly_loaded(lora_on(flow, 1))
    lora = lora_on(flow, 2, base)
    alone = flow.stock(model=lora)
    assert base.model.lowvram_patch_counter > 0
    result = guided(flow, [aligned(lora, 1.0)], base=base)
    assert base.model.model_lowvram
    assert torch.equal(result, alone)
    forget_loaded()


def test_over_fp8_weights_the_loras_are_not_rounded_to_fp8(flow):
    """As ComfyUI does for an offloaded layer, unlike its full load."""
    state = {k: v.clone() for k, v in flow.model.model.diffusion_model.state_dict().items()}
    with torch.inference_mode():
        base = comfy.sd.load_diffusion_model_state_dict(state, {"dtype": torch.float8_e4m3fn})
    lora = lora_on(flow, 1, base)
    result = guided(flow, [aligned(lora, 1.0)], base=base)
    rounded = flow.stock(model=lora)
    forget_loaded()
    assert torch.equal(result, flow.stock(model=partly_loaded(lora)))
    assert biggest(result, rounded) > 1e-3
    forget_loaded()


def test_guidance_refuses_models_that_it_cannot_separate(flow):
    lora = lora_on(flow, 1)
    with pytest.raises(ConfigError, match="equals the base model"):
        irg.IRGGuider(flow.model, [aligned(flow.model.clone(), 1.0)])
    with pytest.raises(ConfigError, match="is not based on the base model"):
        irg.IRGGuider(lora, [aligned(flow.model, 1.0)])
    bypass = comfy_host.execute("LoraModelLoader", flow.model, {}, 1.0)[0]
    bypass.set_injections("bypass_lora", [])
    with pytest.raises(ConfigError, match="bypass"):
        irg.IRGGuider(flow.model, [aligned(bypass, 1.0)])
    other = another_checkpoint(flow, 0.98)
    with pytest.raises(ConfigError, match="LoRAs on the same checkpoint"):
        irg.IRGGuider(flow.model, [aligned(other, 1.0), aligned(lora_on(flow, 1, other), 1.0)])


def scaled(factor):
    """A wrapper of the model function, as a node makes it."""

    def wrapper(apply, args):
        return factor * apply(args["input"], args["timestep"], **args["c"])

    return wrapper


def set_on(model, what, value=0.9):
    """A MODEL with a change that is not of its weights."""
    changed = model.clone()
    if what == "model_function_wrapper":
        changed.set_model_unet_function_wrapper(scaled(value))
    elif what == "sampler_post_cfg_function":
        changed.set_model_sampler_post_cfg_function(lambda args: value * args["denoised"])
    elif what == "patches_replace":
        changed.set_model_attn1_replace(scaled(value), "double_block", 0)
    elif what == "wrappers":
        changed.add_wrapper("diffusion_model", scaled(value))
    else:
        changed = ModelSamplingSD3().patch(model, 4 * value)[0]
    return changed


KINDS = ["model_function_wrapper", "sampler_post_cfg_function", "patches_replace", "wrappers", "model_sampling"]


@pytest.mark.parametrize("what", KINDS)
def test_what_an_aligned_model_has_besides_weights_and_the_base_lacks_is_refused(flow, what):
    for base in (flow.model, set_on(flow.model, what, 0.8)):
        changed = set_on(lora_on(flow, 1, base), what)
        with pytest.raises(ConfigError, match=rf"aligned model 1 has settings that the base model lacks \(.*{what}"):
            irg.IRGGuider(base, [aligned(changed, 1.0)])


@pytest.mark.parametrize("what", KINDS)
def test_what_the_base_has_as_well_is_accepted(flow, what):
    """The LoRA on the changed base, and the same node once on the base and once on the LoRA."""
    base = set_on(flow.model, what)
    for model in (lora_on(flow, 1, base), set_on(lora_on(flow, 1), what)):
        irg.IRGGuider(base, [aligned(model, 1.0)])
    if what not in ("patches_replace", "wrappers"):  # for which the wrapper has the wrong arguments
        lora = lora_on(flow, 1, base)
        assert torch.equal(guided(flow, [aligned(lora, 1.0)], base=base), flow.stock(model=lora))


def test_another_checkpoint_with_options_that_the_base_lacks_is_refused(flow):
    other = another_checkpoint(flow, 0.98)
    irg.IRGGuider(flow.model, [aligned(set_on(other, "model_sampling"), 1.0)])  # which it is loaded with
    for what in ("model_function_wrapper", "wrappers"):
        irg.IRGGuider(set_on(flow.model, what), [aligned(set_on(other, what), 1.0)])
        for base in (flow.model, set_on(flow.model, what, 0.8)):
            with pytest.raises(ConfigError, match=what):
                irg.IRGGuider(base, [aligned(set_on(other, what), 1.0)])


def test_comfyuis_lora_loaders_add_nothing_but_weights(flow, tmp_path, monkeypatch):
    save_file(random_lora(flow, 1), tmp_path / "one.safetensors")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    loaded = comfy_host.execute("LoraLoader", flow.model, flow.clip, "one.safetensors", 1.0, 1.0)[0]
    comfy_models.sample(flow.guider(loaded), flow.sigmas()[[2, -1]], flow.latent())
    irg.IRGGuider(flow.model, [aligned(loaded, 1.0), aligned(lora_on(flow, 2), 1.0)])


def test_guidance_by_two_models_costs_at_most_three_plain_samples(tiny):
    """At most (K + 1) x 1.1 of plain CFG in CPU time; the fastest of several interleaved runs of each."""
    guider = guider_on(tiny, [aligned(lora_on(tiny, 1), 1.5), aligned(lora_on(tiny, 2), 0.5)])
    sigmas, latent = tiny.sigmas(), tiny.latent(8)
    runs = [
        (seconds(lambda: tiny.stock(latent=latent)), seconds(lambda: comfy_models.sample(guider, sigmas, latent)))
        for _ in range(7)
    ]
    plain, cost = (min(times) for times in zip(*runs, strict=True))
    assert cost < 3 * 1.1 * plain


def seconds(work):
    start = time.process_time()
    work()
    return time.process_time() - start
