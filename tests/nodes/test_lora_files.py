"""LoRA files of every family load in ComfyUI: the patched model equals the merged one, weight by weight."""

import pytest

import comfy_host  # isort: skip

comfy_host.skip_without_host()

import diffusers  # noqa: E402
import tiny_pipelines  # noqa: E402
import torch  # noqa: E402

comfy_host.load_pack()
import comfy.model_management as mm  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.supported_models as kinds  # noqa: E402
import comfy.utils  # noqa: E402
from comfy.model_detection import convert_diffusers_mmdit  # noqa: E402
from comfy.model_patcher import ModelPatcher  # noqa: E402

from comfyui_pcpo.lora.families import detect_family  # noqa: E402
from comfyui_pcpo.lora.formats import export_state  # noqa: E402
from comfyui_pcpo.lora.targets import is_target  # noqa: E402

pytestmark = pytest.mark.slow

UNET = {
    "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
    "channel_mult": [1, 2], "transformer_depth": [1, 0], "transformer_depth_output": [1, 1, 0, 0],
    "transformer_depth_middle": 1, "context_dim": 32, "use_spatial_transformer": True, "legacy": False,
    "use_linear_in_transformer": False, "use_temporal_attention": False, "adm_in_channels": None,
}  # fmt: skip
LINEAR = {**UNET, "use_linear_in_transformer": True}
SDXL = {
    **LINEAR, "context_dim": 40, "adm_in_channels": 72, "num_classes": "sequential", "transformer_depth_middle": 2,
}  # fmt: skip
QWEN = {
    "image_model": "qwen_image", "num_layers": 2, "num_attention_heads": 1, "in_channels": 16, "out_channels": 4,
    "joint_attention_dim": 32,
}  # fmt: skip
Z_IMAGE = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 4, "dim": 32, "cap_feat_dim": 16, "n_layers": 1,
    "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "qk_norm": True, "axes_dims": [4, 6, 6],
    "axes_lens": [256, 32, 32], "multiple_of": 1, "ffn_dim_multiplier": 8 / 3, "z_image_modulation": True,
    "time_scale": 1000.0, "pad_tokens_multiple": 32,
}  # fmt: skip
TRANSFORMERS = {"qwen-image": (kinds.QwenImage, QWEN), "z-image": (kinds.ZImage, Z_IMAGE)}
UNETS = {"sd15": (kinds.SD15, UNET), "sd21": (kinds.SD20, LINEAR), "sdxl": (kinds.SDXL, SDXL)}


def load(family, core):
    """ComfyUI's model of a diffusers denoiser."""
    state = {k: v.clone() for k, v in core.state_dict().items()}
    if family not in UNETS and family not in TRANSFORMERS:
        return comfy.sd.load_diffusion_model_state_dict(state, {"dtype": torch.float32})
    kind, config = {**UNETS, **TRANSFORMERS}[family]
    if family in UNETS:
        names = comfy.utils.unet_to_diffusers(config)
        state = {names[k]: v for k, v in state.items()}
    elif family != "qwen-image":
        state = convert_diffusers_mmdit(state)
    supported = kind(config)
    if family in UNETS:  # full-size models have 64 channels per head
        supported.unet_config |= {"num_heads": 2, "num_head_channels": -1}
    supported.set_inference_dtype(torch.float32, None)
    model = supported.get_model(state, "")
    if family == "z-image":  # its time embedding has another width in the host below full size
        own = model.diffusion_model.state_dict()
        state |= {k: torch.zeros_like(v) for k, v in own.items() if k.startswith("t_embedder.")}
    model.diffusion_model.load_state_dict(state)
    return ModelPatcher(model, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device())


def denoiser(family):
    pipeline = tiny_pipelines.build(family)
    if family in ("sd3", "sd35", "flux"):  # the host knows these by their full number of latent channels
        core = dict(pipeline.transformer.config)
        core |= {"in_channels": 64} if family == "flux" else {"in_channels": 16, "out_channels": 16}
        torch.manual_seed(0)
        return getattr(diffusers, type(pipeline.transformer).__name__).from_config(core)
    return getattr(pipeline, "unet", None) or pipeline.transformer


def random_lora(core, rank=2):
    generator, pairs = torch.Generator().manual_seed(0), {}
    for name, module in core.named_modules():
        if is_target(name, "all") and isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            out, *rest = module.weight.shape
            down, up = (rank, *rest), (out, rank, *[1] * (len(rest) - 1))
            pairs[name] = tuple(0.1 * torch.randn(shape, generator=generator) for shape in (down, up))
    return pairs


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("layout", ["comfyui", "diffusers", "kohya"])
@pytest.mark.parametrize("family", tiny_pipelines.PIPELINES)
def test_the_patched_model_equals_the_merged_one(family, layout, strength):
    core = denoiser(family)
    pairs = random_lora(core)
    if family in UNETS and layout == "diffusers":
        pytest.skip("ComfyUI reads few of diffusers' names for UNets; the kohya layout is used instead")
    state = export_state(pairs, 2.0, 2, layout, detect_family(pairs))
    model = load(family, core)
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    patched, _ = comfy.sd.load_lora_for_models(model, None, state, strength, 0.0)
    patched.patch_model(device_to=torch.device("cpu"))
    loaded = {k: v.clone() for k, v in patched.model.state_dict().items()}
    patched.unpatch_model()

    with torch.no_grad():
        for name, (down, up) in pairs.items():
            weight = core.get_submodule(name).weight
            weight += strength * (up.flatten(1) @ down.flatten(1)).view_as(weight)
    merged = load(family, core).model.state_dict()
    assert loaded.keys() == merged.keys()
    changed = [key for key in merged if not torch.equal(merged[key], before[key])]
    assert len(changed) == len({key for key in merged if not torch.equal(loaded[key], before[key])}) > 0
    for key in merged:
        torch.testing.assert_close(loaded[key], merged[key], rtol=1e-5, atol=1e-5, msg=key)
