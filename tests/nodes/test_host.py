"""What the nodes rely on in ComfyUI, one test each, so that a change of ComfyUI shows as one clear failure.

Files in nodes/ import and call ComfyUI; each test below states one thing that they take for granted. Whether our own
results are right is tested elsewhere.
"""

import ast
import importlib
import inspect
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "support"))
import comfy_host

comfy_host.skip_without_host()
comfy_host.load_pack()

import comfy.conds  # noqa: E402
import comfy.float  # noqa: E402
import comfy.lora  # noqa: E402
import comfy.model_management as mm  # noqa: E402
import comfy.model_sampling  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.quant_ops  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.sd1_clip  # noqa: E402
import comfy.utils  # noqa: E402
import folder_paths  # noqa: E402
import server  # noqa: E402
from comfy.ldm.modules.attention import attention_pytorch, optimized_attention  # noqa: E402
from comfy.model_patcher import MemoryCounter  # noqa: E402
from comfy.patcher_extension import WrappersMP  # noqa: E402

HOST = ("comfy", "comfy_api", "comfy_kitchen", "folder_paths", "latent_preview", "nodes", "server")
SIGMAS = torch.tensor([0.8, 0.4, 0.0])
LATENT = torch.zeros(1, 16, 4, 4)


# Names


def is_host(module):
    return module is not None and module.split(".")[0] in HOST


def names_in(file):
    """The names of ComfyUI that a file uses, as (module, attributes)."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    aliases, used = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and is_host(node.module):
            used.update((node.module, alias.name) for alias in node.names)
            aliases.update({alias.asname or alias.name: f"{node.module}:{alias.name}" for alias in node.names})
        if isinstance(node, ast.Import):
            for alias in node.names:
                if is_host(alias.name):
                    used.add((alias.name, ""))
                    aliases[alias.asname or alias.name.split(".")[0]] = (
                        alias.name if alias.asname else alias.name.split(".")[0]
                    )
    for node in ast.walk(tree):
        chain, inner = [], node
        while isinstance(inner, ast.Attribute):
            chain.append(inner.attr)
            inner = inner.value
        if chain and isinstance(inner, ast.Name) and inner.id in aliases:
            module, _, first = aliases[inner.id].partition(":")
            used.add((module, ".".join([*([first] if first else []), *reversed(chain)])))
    return used


USED = sorted(set().union(*(names_in(file) for file in (comfy_host.PACK / "nodes").rglob("*.py"))))


@pytest.mark.parametrize(("module", "attributes"), USED, ids=[".".join(filter(None, name)) for name in USED])
def test_a_name_that_the_nodes_use_exists(module, attributes):
    found = importlib.import_module(module)
    for name in filter(None, attributes.split(".")):
        if not hasattr(found, name) and inspect.ismodule(found):
            importlib.import_module(f"{found.__name__}.{name}")
        if name == "instance":  # of PromptServer: exists while the server runs
            return
        found = getattr(found, name)


def test_the_names_are_found():
    assert ("comfy.samplers", "CFGGuider") in USED or ("comfy", "samplers.CFGGuider") in USED
    assert len(USED) > 80


# Models and sampling


@pytest.fixture(scope="module")
def tiny():
    """(model, clip, vae) of the embedded flow model."""
    return comfy_host.execute("PCPOLoadTinyModel", "emoji-flow")[:3]


@pytest.fixture
def sampled(tiny):
    """What a sampler gets: its guider, its arguments, and what one call of the model returned."""
    model, clip, _ = tiny
    found = {}

    class Probe(comfy.samplers.Sampler):
        def sample(self, guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar):
            found.update(guider=guider, options=extra_args["model_options"], inner=guider.inner_model)
            found.update(conds=dict(guider.conds), noise=noise)
            found["x"] = x = torch.ones_like(noise)

            def call():
                return guider(x, torch.full((1,), 0.5), model_options=extra_args["model_options"], seed=0)

            found["denoised"] = call()
            guider.conds["positive"] = guider.conds["negative"]
            found["of another prompt"] = call()
            return noise

    guider = comfy.samplers.CFGGuider(model)
    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a fox", ""))
    guider.inner_set_conds({"positive": positive, "positive_1": positive, "negative": negative})
    guider.set_cfg(1.0)
    found["result"] = guider.sample(LATENT, LATENT, Probe(), SIGMAS, disable_pbar=True, seed=0)
    return found


def test_a_sampler_gets_the_guider_with_its_loaded_model_and_options(sampled):
    assert sampled["guider"].model_patcher is not None and "transformer_options" in sampled["options"]
    assert isinstance(sampled["inner"].diffusion_model, nn.Module)


def test_a_guider_processes_conditionings_of_any_name(sampled):
    for name in ("positive", "positive_1", "negative"):
        parts = sampled["conds"][name][0]["model_conds"]
        assert all(hasattr(part, "cond") and hasattr(part, "_copy_with") for part in parts.values())


def test_a_guider_called_in_a_sampler_returns_the_clean_latent(sampled):
    """For a flow model x0 = x - sigma v."""
    inner, x = sampled["inner"], sampled["x"]
    v = torch.ones_like(x)
    clean = inner.model_sampling.calculate_denoised(torch.full((1,), 0.5), v, x)
    assert torch.allclose(clean, x - 0.5 * v) and sampled["denoised"].shape == x.shape


def test_a_guider_takes_the_conditionings_that_it_has_at_each_call(sampled):
    assert not torch.equal(sampled["denoised"], sampled["of another prompt"])


@pytest.mark.parametrize("kind", [comfy.model_sampling.EPS, comfy.model_sampling.V_PREDICTION])
def test_epsilon_and_v_models_get_clean_plus_sigma_noise(kind):
    noise, clean = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    scaled = kind.noise_scaling(object(), torch.tensor(3.0), noise.clone(), clean)
    assert torch.allclose(scaled, clean + 3 * noise)


def test_flow_models_get_an_interpolation():
    noise, clean = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    scaled = comfy.model_sampling.CONST.noise_scaling(object(), torch.tensor(0.3), noise, clean)
    assert torch.allclose(scaled, 0.7 * clean + 0.3 * noise)


def test_discrete_noise_levels_are_those_of_the_training_schedule(tiny):
    sampling = comfy_host.execute("PCPOLoadTinyModel", "emoji-eps")[0].get_model_object("model_sampling")
    assert isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete) and len(sampling.sigmas) == 1000
    assert sampling.timestep(sampling.sigmas[[999]]).item() == 999


def test_a_ksampler_function_gets_its_options_the_masked_model_and_the_mask(tiny):
    model, clip, _ = tiny
    seen = {}

    def sample(wrapped, x, sigmas, extra_args, callback, disable, mine):
        seen.update(mine=mine, patcher=wrapped.inner_model.model_patcher, latent=wrapped.latent_image, args=extra_args)
        callback({"x": x, "i": 0, "sigma": sigmas[0], "sigma_hat": sigmas[0], "denoised": x})
        return x

    guider = comfy.samplers.CFGGuider(model)
    cond = clip.encode_from_tokens_scheduled(clip.tokenize("a fox"))
    guider.set_conds(cond, cond)
    sampler, mask, steps = comfy.samplers.KSAMPLER(sample, {"mine": 7}), torch.ones(1, 1, 4, 4), []
    guider.sample(LATENT, LATENT, sampler, SIGMAS, mask, lambda step, *_: steps.append(step), True, 3)
    assert seen["mine"] == 7 and seen["patcher"].is_clone(model) and seen["latent"].shape == LATENT.shape
    assert seen["args"]["seed"] == 3 and seen["args"]["denoise_mask"] is not None and steps == [0]


def test_preparing_to_sample_can_be_wrapped_to_reserve_memory(tiny):
    model, shapes = tiny[0].clone(), []

    def prepare(executor, model, noise_shape, *args, **kwargs):
        shapes.append(list(noise_shape))
        return executor(model, noise_shape, *args, **kwargs)

    model.add_wrapper(WrappersMP.PREPARE_SAMPLING, prepare)
    guider = comfy.samplers.CFGGuider(model)
    cond = tiny[1].encode_from_tokens_scheduled(tiny[1].tokenize(""))
    guider.set_conds(cond, cond)
    guider.sample(LATENT, LATENT, comfy.samplers.ksampler("euler"), SIGMAS, disable_pbar=True, seed=0)
    assert shapes == [[1, 16, 4, 4]]


def test_attention_can_be_replaced_by_a_transformer_option():
    q, called = torch.randn(1, 4, 32), []

    def override(function, *args, **kwargs):
        called.append(function)
        return attention_pytorch(*args, **kwargs)

    out = optimized_attention(q, q, q, 2, transformer_options={"optimized_attention_override": override})
    assert called and torch.allclose(out, attention_pytorch(q, q, q, 2), atol=1e-6)


def test_a_latent_format_says_channels_dimensions_and_scale(tiny):
    form = tiny[0].model.latent_format
    assert (form.latent_channels, form.latent_dimensions, form.spacial_downscale_ratio) == (16, 2, 8)


def test_an_empty_latent_gets_the_models_channels(tiny):
    assert comfy.sample.fix_empty_latent_channels(tiny[0], torch.zeros(1, 4, 8, 8), 8, None).shape == (1, 16, 8, 8)


def test_noise_of_a_seed_is_the_cpus(tiny):
    noise = comfy.sample.prepare_noise(LATENT, 5)
    assert torch.equal(noise, torch.randn(LATENT.shape, generator=torch.Generator().manual_seed(5)))


# Weights, patches, gradients


def test_a_clone_shares_weights_and_knows_its_base(tiny):
    model = tiny[0]
    clone = model.clone()
    assert clone.is_clone(model) and clone.model is model.model
    assert isinstance(clone.patches, dict) and isinstance(clone.injections, dict)


def test_what_nodes_set_besides_weights_is_in_six_dicts_of_a_model(tiny):
    settings = tiny[0].clone()
    settings.set_model_unet_function_wrapper(max)
    settings.add_object_patch("model_sampling", max)
    settings.add_wrapper("diffusion_model", max)
    settings.add_weight_wrapper("a.weight", max)
    assert settings.model_options["model_function_wrapper"] is settings.object_patches["model_sampling"] is max
    assert settings.wrappers["diffusion_model"][None] == settings.weight_wrapper_patches["a.weight"] == [max]
    assert isinstance(settings.callbacks, dict) and isinstance(settings.hook_patches, dict)
    assert not tiny[0].object_patches and "model_function_wrapper" not in tiny[0].model_options


def test_a_lora_is_a_patch_of_a_weight_and_unknown_keys_add_none(tiny):
    model = tiny[0]
    name, key = next(
        (name, key) for name, key in comfy.lora.model_lora_keys_unet(model.model, {}).items()
        if name.startswith("lora_unet_") and isinstance(key, str) and model.model.state_dict()[key].ndim == 2
    )  # fmt: skip
    out, width = model.model.state_dict()[key].shape
    state = {f"{name}.lora_up.weight": torch.ones(out, 1), f"{name}.lora_down.weight": torch.ones(1, width)}
    loaded = comfy.sd.load_lora_for_models(model, None, state, 1.0, 0)[0]
    assert list(loaded.patches) == [key] and not model.patches
    patched = comfy.lora.calculate_weight(loaded.patches[key], torch.zeros(out, width), key)
    assert torch.allclose(patched, torch.ones(out, width))
    assert not comfy.sd.load_lora_for_models(model, None, {"nothing.lora_up.weight": torch.ones(1, 1)}, 1.0, 0)[
        0
    ].patches


def test_a_lora_name_stands_for_a_weight_or_for_a_range_of_its_rows(tiny):
    targets = comfy.lora.model_lora_keys_unet(tiny[0].model, {}).values()
    ranges = [target[1] for target in targets if not isinstance(target, str) and target[1] is not None]
    assert ranges and all(len(part) == 3 and part[0] == 0 for part in ranges)  # (axis, first row, rows)


def test_weight_functions_of_a_layer_change_its_weight():
    layer = comfy.ops.disable_weight_init.Linear(2, 2, bias=False)
    layer.weight.data = torch.eye(2)
    assert layer.weight_function == [] and layer.bias_function == []
    layer.weight_function = [lambda weight: 3 * weight]
    assert torch.equal(layer(torch.ones(1, 2)), torch.full((1, 2), 3.0))


def test_a_layers_weight_is_cast_for_an_input_and_given_back():
    layer = comfy.ops.disable_weight_init.Linear(2, 2)
    weight, bias, stream = comfy.ops.cast_bias_weight(layer, torch.ones(1, 2, dtype=torch.bfloat16), offloadable=True)
    assert weight.dtype == bias.dtype == torch.bfloat16
    comfy.ops.uncast_bias_weight(layer, weight, bias, stream)
    assert isinstance(layer, comfy.ops.CastWeightBiasOp)


def test_every_fused_function_has_an_eager_one():
    differentiable = comfy_host.pack_module("nodes.host.differentiable")
    for name in differentiable.FUSED:
        assert callable(getattr(comfy.quant_ops.ck, name)) and callable(getattr(differentiable.eager, name))


def test_stochastic_rounding_of_float32_changes_nothing():
    weight = torch.randn(3, 3)
    assert torch.equal(comfy.float.stochastic_rounding(weight, torch.float32, 1), weight)


def test_a_memory_counter_refuses_beyond_its_minimum():
    counter = MemoryCounter(100, minimum=50)
    assert counter.use(torch.zeros(10)) and not counter.use(torch.zeros(10))


def test_training_is_a_flag_of_model_management():
    assert mm.in_training is False


def test_conditionings_say_whether_they_can_share_a_batch():
    a, b = torch.zeros(1, 2, 3), torch.zeros(1, 4, 3)
    assert comfy.conds.CONDCrossAttn(a).can_concat(comfy.conds.CONDCrossAttn(b))
    assert not comfy.conds.CONDRegular(a).can_concat(comfy.conds.CONDRegular(b))
    assert not comfy.conds.CONDConstant(1).can_concat(comfy.conds.CONDConstant(2))
    assert isinstance(comfy.conds.CONDList([a]).cond, list)


# Prompts, interrupts, folders, the page


def test_prompt_weights_are_parsed_with_their_escapes():
    parts = comfy.sd1_clip.token_weights(comfy.sd1_clip.escape_important(r"a (fox:1.3) \(x\)"), 1.0)
    assert [comfy.sd1_clip.unescape_important(text) for text, _ in parts] == ["a ", "fox", " (x)"]
    assert [weight for _, weight in parts] == [1.0, 1.3, 1.0]


def test_cancel_raises_what_no_except_exception_catches_and_only_once():
    mm.interrupt_current_processing()
    with pytest.raises(mm.InterruptProcessingException) as raised:
        mm.throw_exception_if_processing_interrupted()
    assert not isinstance(raised.value, Exception)
    mm.throw_exception_if_processing_interrupted()


def test_there_are_an_output_and_a_temporary_folder_and_model_folders():
    assert Path(folder_paths.get_output_directory()).is_absolute()
    assert Path(folder_paths.get_temp_directory()).is_absolute()
    assert Path(folder_paths.models_dir).name == "models"


def test_the_server_sends_events():
    assert {"event", "data"} <= set(inspect.signature(server.PromptServer.send_sync).parameters)


def test_samplers_and_schedulers_are_listed():
    assert "euler" in comfy.samplers.SAMPLER_NAMES
    assert {"normal", "simple"} <= set(comfy.samplers.SCHEDULER_NAMES)


def test_a_progress_bar_takes_a_total_and_a_preview():
    assert {"value", "total", "preview"} <= set(inspect.signature(comfy.utils.ProgressBar.update_absolute).parameters)


def test_an_embedded_model_can_be_copied_whole(tiny):
    """As ComfyUI's own Train LoRA copies the MODEL that it gets."""
    copied = tiny[0].clone(force_deepcopy=True, disable_dynamic=True)
    ours, theirs = (patcher.model.state_dict() for patcher in (tiny[0], copied))
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].data_ptr() != theirs[key].data_ptr() for key in ours)
