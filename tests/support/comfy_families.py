"""Tiny random models of each family, in ComfyUI's classes and in diffusers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import comfy_host
import diffusers
import torch
from einops import rearrange
from torch.func import functional_call

comfy_host.load_pack()
import comfy.model_base  # noqa: E402
import comfy.model_management as mm  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.supported_models  # noqa: E402
import comfy.utils  # noqa: E402
from comfy.model_patcher import ModelPatcher  # noqa: E402

types = comfy_host.pack_module("nodes.types")
WIDTH, POOLED, LINE = 32, 16, "a fox"
UNET = {
    "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
    "channel_mult": [1, 2], "transformer_depth": [0, 1], "transformer_depth_output": [0, 0, 1, 1],
    "transformer_depth_middle": 1, "context_dim": WIDTH, "use_spatial_transformer": True, "legacy": False,
    "use_linear_in_transformer": True, "use_temporal_attention": False, "adm_in_channels": None,
}  # fmt: skip
SDXL = {**UNET, "adm_in_channels": POOLED + 6 * 256, "num_classes": "sequential"}


class SD2(comfy.supported_models.SD20):
    """SD2.1 with v-prediction; ComfyUI detects it by a weight that a tiny model lacks."""

    def model_type(self, state_dict, prefix=""):
        return comfy.model_base.ModelType.V_PREDICTION


@dataclass
class Family:
    """Inputs of training (model, vae, prompts, latent), and the same model in diffusers."""

    model: Any
    core: torch.nn.Module
    call: Callable[..., torch.Tensor]
    texts: list[tuple[torch.Tensor, torch.Tensor]]  # prompt and negative prompt: hidden states, pooled
    channels: int
    v_prediction: bool = False
    vae: Any = None

    @property
    def prompts(self):
        conds = [[[hidden, {"pooled_output": pooled}]] for hidden, pooled in self.texts]
        return types.EncodedPrompts((LINE,), (conds[0],), "", conds[1])

    def latent(self, count):
        return {"samples": torch.zeros(count, self.channels, 8, 8)}

    def predict(self, pairs, x, timestep, sigma, cfg):
        """Epsilon or velocity by diffusers with W + up down in place of each weight W, with guidance."""
        weights = dict(self.core.named_parameters())
        changed = {f"{name}.weight": weights[f"{name}.weight"] + up @ down for name, (down, up) in pairs.items()}
        with torch.inference_mode(False):
            texts = [tuple(t.clone() for t in text) for text in self.texts]
            good, bad = (
                self.call(lambda **inputs: functional_call(self.core, changed, (), inputs), x, timestep, *text)
                for text in texts
            )
        out = bad + cfg * (good - bad)
        if self.v_prediction:
            alpha = 1 / (1 + sigma**2)
            out = alpha**0.5 * out + (1 - alpha) ** 0.5 * x
        return out


def call_unet(core, x, t, hidden, pooled):
    return core(sample=x, timestep=t, encoder_hidden_states=hidden.expand(len(x), -1, -1)).sample


def call_sdxl(core, x, t, hidden, pooled):
    sizes = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]])
    extra = {"text_embeds": pooled.expand(len(x), -1), "time_ids": sizes.expand(len(x), -1)}
    hidden = hidden.expand(len(x), -1, -1)
    return core(sample=x, timestep=t, encoder_hidden_states=hidden, added_cond_kwargs=extra).sample


def call_sd3(core, x, t, hidden, pooled):
    return core(
        hidden_states=x, timestep=torch.full((len(x),), t), encoder_hidden_states=hidden.expand(len(x), -1, -1),
        pooled_projections=pooled.expand(len(x), -1),
    ).sample  # fmt: skip


def call_flux(core, x, t, hidden, pooled):
    rows, columns = (n // 2 for n in x.shape[-2:])
    places = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1).flatten(0, 1)
    out = core(
        hidden_states=rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2),
        timestep=torch.full((len(x),), t / 1000), guidance=torch.full((len(x),), 3.5),
        encoder_hidden_states=hidden.expand(len(x), -1, -1), pooled_projections=pooled.expand(len(x), -1),
        img_ids=torch.nn.functional.pad(places.float(), (1, 0)), txt_ids=torch.zeros(hidden.shape[1], 3),
    ).sample  # fmt: skip
    return rearrange(out, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=2, q=2)


def unet_core(**changes):
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=1, use_linear_projection=True, **changes,
    )  # fmt: skip


def sdxl_core():
    return unet_core(
        addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=SDXL["adm_in_channels"],
    )  # fmt: skip


def sd3_core():
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, num_layers=2, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=WIDTH, caption_projection_dim=128, pooled_projection_dim=POOLED, out_channels=16,
        pos_embed_max_size=8,
    )  # fmt: skip


def flux_core():
    return diffusers.FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=128, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=POOLED, axes_dims_rope=(16, 56, 56), guidance_embeds=True,
    )  # fmt: skip


FAMILIES = {
    "sd2-v": (unet_core, call_unet, SD2, UNET),
    "sdxl": (sdxl_core, call_sdxl, comfy.supported_models.SDXL, SDXL),
    "sdxl-v": (sdxl_core, call_sdxl, comfy.supported_models.SDXL, SDXL),
    "sd3": (sd3_core, call_sd3, None, None),
    "flux": (flux_core, call_flux, None, None),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> Family:
    """A tiny random model; its weights and conditionings are inference tensors, as in ComfyUI."""
    build, call, kind, config = FAMILIES[name]
    torch.manual_seed(0)
    core = build().eval().requires_grad_(False)
    for p in core.parameters():
        p.add_(0.02 * torch.randn_like(p))
    state = {k: v.clone() for k, v in core.state_dict().items()}
    with torch.inference_mode():
        if kind is None:
            model = comfy.sd.load_diffusion_model_state_dict(state, {"dtype": dtype})
        else:
            model = load_unet(state, kind, config, {"v_pred": torch.zeros(0)} if name == "sdxl-v" else {})
        texts = [(torch.randn(1, 8, WIDTH), torch.randn(1, POOLED)) for _ in range(2)]
    return Family(model, core, call, texts, 4 if kind else 16, name.endswith("-v"))


def load_unet(state, kind, config, marks) -> ModelPatcher:
    """ComfyUI detects UNets by their full sizes, so a tiny one needs its class given."""
    names = comfy.utils.unet_to_diffusers(config)
    state = {**{names[k]: v for k, v in state.items()}, **marks}
    supported = kind(config)
    supported.set_inference_dtype(torch.float32, None)
    model = supported.get_model(state, "")
    model.load_model_weights(state, "")
    return ModelPatcher(model, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device())


def with_scaled_fp8(family: Family) -> Family:
    """The same model with its blocks in scaled fp8, in the layout of ComfyUI's quantized checkpoints."""
    with torch.inference_mode():
        state = {k: v.clone() for k, v in family.model.model.diffusion_model.state_dict().items()}
        form = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
        for key in [k for k, v in state.items() if k.endswith(".weight") and v.ndim == 2 and "block" in k]:
            name, scale = key.removesuffix("weight"), state[key].abs().max() / 448
            state |= {key: (state[key] / scale).to(torch.float8_e4m3fn), name + "weight_scale": scale}
            state[name + "comfy_quant"] = form.clone()
        return replace(family, model=comfy.sd.load_diffusion_model_state_dict(state, {}))
