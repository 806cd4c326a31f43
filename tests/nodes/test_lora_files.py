"""LoRA files of every family load in ComfyUI: the patched model equals the merged one, weight by weight.

ComfyUI 0.33 has no Qwen-Image 2.1.
"""

from operator import itemgetter

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
FLUX = {
    "in_channels": 4, "out_channels": 4, "patch_size": 2, "hidden_size": 32, "context_in_dim": 32, "num_heads": 2,
    "depth": 1, "depth_single_blocks": 1, "axes_dim": [4, 6, 6], "theta": 10000, "mlp_ratio": 4.0, "qkv_bias": True,
    "vec_in_dim": None, "txt_ids_dims": [],
}  # fmt: skip
CHROMA = {
    **FLUX, "image_model": "chroma", "in_channels": 16, "out_channels": 16, "in_dim": 16, "out_dim": 32,
    "hidden_dim": 16, "n_layers": 1,
}  # fmt: skip
FLUX2 = {
    **FLUX, "image_model": "flux2", "guidance_embed": False, "patch_size": 1, "in_channels": 16, "out_channels": 16,
    "context_in_dim": 48, "mlp_ratio": 3.0, "axes_dim": [4, 4, 4, 4], "theta": 2000, "global_modulation": True,
    "mlp_silu_act": True, "qkv_bias": False, "ops_bias": False, "default_ref_method": "index", "ref_index_scale": 10.0,
    "txt_ids_dims": [3],
}  # fmt: skip
KREA2 = {
    "image_model": "krea2", "features": 32, "tdim": 16, "txtdim": 16, "heads": 2, "kvheads": 1, "layers": 1,
    "channels": 4, "txtlayers": 2, "txtheads": 1, "txtkvheads": 1,
}  # fmt: skip
TRANSFORMERS = {
    "qwen-image": (kinds.QwenImage, QWEN, None),
    "z-image": (kinds.ZImage, Z_IMAGE, comfy.utils.z_image_to_diffusers),
    "chroma": (kinds.Chroma, CHROMA, comfy.utils.flux_to_diffusers),
    "krea2": (kinds.Krea2, KREA2, comfy.utils.krea2_to_diffusers),
    "flux2-klein": (kinds.Flux2, FLUX2, comfy.utils.flux_to_diffusers),
}  # class and configuration, and the host's table from diffusers' names to its own
RENAMED = {family: table for family, (_, _, table) in TRANSFORMERS.items() if table}
UNETS = {
    "sd15": (kinds.SD15, UNET, comfy.utils.unet_to_diffusers),
    "sd21": (kinds.SD20, LINEAR, comfy.utils.unet_to_diffusers),
    "sdxl": (kinds.SDXL, SDXL, comfy.utils.unet_to_diffusers),
}


def load(family, core):
    """ComfyUI's model of a diffusers denoiser."""
    state = {k: v.clone() for k, v in core.state_dict().items()}
    if family not in UNETS and family not in TRANSFORMERS:
        return comfy.sd.load_diffusion_model_state_dict(state, {"dtype": torch.float32})
    kind, config, table = {**UNETS, **TRANSFORMERS}[family]
    if table is not None:
        state = renamed(state, table(config))
    supported = kind(config)
    if family in UNETS:  # full-size models have 64 channels per head
        supported.unet_config |= {"num_heads": 2, "num_head_channels": -1}
    supported.set_inference_dtype(torch.float32, None)
    model = supported.get_model(state, "")
    own = model.diffusion_model.state_dict()
    if family in TRANSFORMERS:  # around the blocks, the host's tables lack names, and small models have other widths
        state = {k: v if k not in state or state[k].shape != v.shape else state[k] for k, v in blank(own).items()}
    model.diffusion_model.load_state_dict(state)
    return ModelPatcher(model, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device())


def renamed(state, names):
    """Weights by the host's names; parts of one weight are joined in their order."""
    parts = {}
    for key in state.keys() & names.keys():
        name, place, *_ = names[key] if isinstance(names[key], tuple) else (names[key], None)
        parts.setdefault(name, []).append((place[1] if place else 0, state[key]))
    return {name: torch.cat([v for _, v in sorted(found, key=itemgetter(0))]) for name, found in parts.items()}


def blank(state):
    return {k: torch.zeros_like(v) for k, v in state.items()}


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
@pytest.mark.parametrize("family", [name for name in tiny_pipelines.LORAS if name != "qwen-image-2.1"])
def test_the_patched_model_equals_the_merged_one(family, layout, strength):
    core = denoiser(family)
    pairs = random_lora(core)
    if family in RENAMED:
        assert {f"{name}.weight" for name in pairs} <= RENAMED[family](TRANSFORMERS[family][1]).keys()
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
