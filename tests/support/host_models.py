"""Tiny random models of the families of today, in ComfyUI's own classes, with all that is needed to train them."""

from dataclasses import dataclass
from typing import Any

import comfy_host
import torch
from torch import nn

comfy_host.load_pack()
import comfy.ldm.anima.model  # noqa: E402
import comfy.model_management as mm  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.supported_models as kinds  # noqa: E402
import comfy.taesd.taesd  # noqa: E402
from comfy.model_patcher import ModelPatcher  # noqa: E402

options = comfy_host.pack_module("trainer.config.loading")
types = comfy_host.pack_module("nodes.types")
LINES = ("a fox", "two red stars")
TEXT = 32  # width of the text embeddings
SIDE = 4  # of the latent

COSMOS = {
    "max_img_h": 8, "max_img_w": 8, "max_frames": 4, "in_channels": 16, "out_channels": 16, "patch_spatial": 2,
    "patch_temporal": 1, "model_channels": 64, "num_blocks": 2, "num_heads": 2, "crossattn_emb_channels": TEXT,
    "pos_emb_cls": "rope3d", "pos_emb_learnable": True, "use_adaln_lora": True, "adaln_lora_dim": 8,
    "extra_per_block_abs_pos_emb": False, "rope_enable_fps_modulation": False,
}  # fmt: skip
LUMINA = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 64, "cap_feat_dim": TEXT, "n_layers": 2,
    "n_refiner_layers": 2, "n_heads": 2, "qk_norm": True, "axes_dims": [8, 12, 12], "axes_lens": [64, 64, 64],
    "multiple_of": 16,
}  # fmt: skip
FLUX = {
    "patch_size": 2, "in_channels": 16, "out_channels": 16, "hidden_size": 64, "context_in_dim": TEXT, "num_heads": 2,
    "depth": 1, "depth_single_blocks": 2, "axes_dim": [8, 12, 12], "theta": 10000, "mlp_ratio": 4.0, "qkv_bias": True,
    "vec_in_dim": None, "txt_ids_dims": [],
}  # fmt: skip
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "z-image": (kinds.ZImage, {
        **LUMINA, "dim": 256, "axes_dims": [32, 48, 48], "n_kv_heads": 2, "rope_theta": 256.0, "n_layers": 1,
        "n_refiner_layers": 1, "ffn_dim_multiplier": 1.0, "z_image_modulation": True, "time_scale": 1000.0,
        "pad_tokens_multiple": 8,
    }),
    "lumina2": (kinds.Lumina2, {**LUMINA, "n_kv_heads": 1}),  # fewer key than query heads, as in Lumina 2
    "anima": (kinds.Anima, {**COSMOS, "image_model": "anima"}),
    "cosmos-predict2": (kinds.CosmosT2IPredict2, {**COSMOS, "image_model": "cosmos_predict2"}),
    "wan": (kinds.WAN21_T2V, {
        "image_model": "wan2.1", "model_type": "t2v", "dim": 48, "ffn_dim": 96, "num_heads": 2, "num_layers": 2,
        "text_dim": TEXT, "freq_dim": 32, "in_dim": 16, "out_dim": 16,
    }),
    "ideogram4": (kinds.Ideogram4, {
        "image_model": "ideogram4", "in_channels": 128, "num_layers": 2, "num_attention_heads": 2,
        "attention_head_dim": 32, "intermediate_size": 96, "adaln_dim": 16, "llm_features_dim": TEXT,
        "mrope_section": (6, 5, 5),
    }),
    "hidream": (kinds.HiDream, {
        "image_model": "hidream", "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 1,
        "num_single_layers": 1, "attention_head_dim": 32, "num_attention_heads": 2, "axes_dims_rope": [16, 8, 8],
        "caption_channels": [TEXT, TEXT], "text_emb_dim": 16, "max_resolution": [8, 8], "llama_layers": [0, 1],
        "num_routed_experts": 4, "num_activated_experts": 2,
    }),
    "ernie-image": (kinds.ErnieImage, {
        "image_model": "ernie", "hidden_size": 64, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 96,
        "text_in_dim": TEXT, "rope_axes_dim": (8, 12, 12),
    }),
    "krea2": (kinds.Krea2, {
        "image_model": "krea2", "features": 64, "tdim": 32, "txtdim": TEXT // 2, "heads": 2, "kvheads": 1, "layers": 2,
        "channels": 16, "txtlayers": 2, "txtheads": 2, "txtkvheads": 2,
    }),
    "chroma": (kinds.Chroma, {
        **FLUX, "image_model": "chroma", "in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 64,
        "hidden_dim": 16, "n_layers": 1,
    }),
    "flux2": (kinds.Flux2, {
        **FLUX, "image_model": "flux2", "guidance_embed": False, "patch_size": 1, "in_channels": 128,
        "out_channels": 128, "mlp_ratio": 3.0, "axes_dim": [8, 8, 8, 8], "theta": 2000, "global_modulation": True,
        "mlp_silu_act": True, "qkv_bias": False, "ops_bias": False, "default_ref_method": "index",
        "ref_index_scale": 10.0, "txt_ids_dims": [3],
    }),
    "qwen-image": (kinds.QwenImage, {
        "image_model": "qwen_image", "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32,
        "axes_dims_rope": (8, 12, 12), "in_channels": 64, "out_channels": 16, "joint_attention_dim": TEXT,
    }),
    "sd3": (kinds.SD3, {
        "in_channels": 16, "patch_size": 2, "out_channels": 16, "depth": 2, "input_size": None, "adm_in_channels": 16,
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": TEXT, "out_features": 128}},
        "num_patches": 16, "pos_embed_max_size": 4, "pos_embed_scaling_factor": None,
    }),
}  # fmt: skip
BLOCKS = {  # how many blocks one call of each model runs
    "z-image": 3, "lumina2": 6, "anima": 3, "cosmos-predict2": 2, "wan": 2, "ideogram4": 2, "hidream": 2,
    "ernie-image": 2, "krea2": 6, "chroma": 4, "flux2": 3, "qwen-image": 2, "sd3": 2,
}  # fmt: skip
POOLED = ("hidream", "sd3")


@dataclass
class HostModel:
    """A MODEL of one family, a VAE of its latents, prompts, and an empty latent."""

    name: str
    model: Any
    vae: Any
    prompts: Any

    def latent(self, count: int = 1) -> dict[str, torch.Tensor]:
        form = self.model.model.latent_format
        frames = (1,) * (form.latent_dimensions - 2)
        return {"samples": torch.zeros(count, form.latent_channels, *frames, SIDE, SIDE)}


def make(name: str) -> HostModel:
    """The same random weights every time; weights and conditionings are inference tensors, as in ComfyUI."""
    kind, config = CONFIGS[name]
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        supported = kind(config)
        supported.unet_config = dict(config)
        supported.set_inference_dtype(torch.float32, None)
        model = supported.get_model({}, "")
        core = model.diffusion_model
        if name == "anima":  # its adapter has one size, of a hundred million weights
            core.llm_adapter = comfy.ldm.anima.model.LLMAdapter(
                TEXT, TEXT, TEXT, num_layers=1, num_heads=2, operations=comfy.ops.manual_cast
            )
        randomize(core, generator)
        patcher = ModelPatcher(model, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device())
        return HostModel(name, patcher, small_vae(model.latent_format.latent_channels), texts(name, generator))


def randomize(module: nn.Module, generator: torch.Generator) -> None:
    """Weights that keep the size of what passes through them; norms near 1."""
    for key, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim > 1:
            p.copy_(noise * 0.7 / p[0].numel() ** 0.5)
        else:
            p.copy_(0.1 * noise + key.endswith(".weight"))
    for key, buffer in module.named_buffers():
        if key == "pos_embed":  # SD3's, which ComfyUI leaves uninitialized until a checkpoint is loaded
            buffer.copy_(torch.randn(buffer.shape, generator=generator))


def small_vae(channels: int) -> Any:
    """A TAESD with random weights."""
    core = comfy.taesd.taesd.TAESD(latent_channels=channels)
    state = {k: v.clone() for k, v in core.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    for key, value in state.items():
        if value.is_floating_point() and value.ndim > 1:
            state[key] = torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5
        elif value.ndim == 1:
            state[key] = torch.zeros_like(value)
    return comfy.sd.VAE(sd=state, metadata={"tae_latent_channels": channels})


def texts(name: str, generator: torch.Generator) -> Any:
    """Two prompts of different lengths and a negative prompt, encoded as the family's text encoder would."""
    conds = [encoded(name, length, generator) for length in (7, 5, 3)]
    return types.EncodedPrompts(LINES, (conds[0], conds[1]), "", conds[2])


def encoded(name: str, length: int, generator: torch.Generator) -> list[Any]:
    more: dict[str, Any] = {}
    if name in POOLED:
        more["pooled_output"] = torch.randn(1, 16, generator=generator)
    if name in ("z-image", "lumina2", "qwen-image"):
        more["attention_mask"] = torch.ones(1, length, dtype=torch.long)
    if name == "hidream":
        more["conditioning_llama3"] = torch.randn(1, 2, length, TEXT, generator=generator)
    if name == "anima":
        more["t5xxl_ids"] = torch.arange(length)
        more["t5xxl_weights"] = torch.ones(length)
    return [[torch.randn(1, length, TEXT, generator=generator), more]]


def config(objective="log_hinge", checkpointing=False, lines=LINES, **rollout):
    """Two updates of four images."""
    return options.build(
        {
            "model": {"name": "emoji-flow", "gradient_checkpointing": checkpointing},
            "prompts": {"lines": list(lines)},
            "rollout": {"prompts_per_update": 2, "group_size": 2, "steps": 3, "cfg": 2.0, **rollout},
            "reward": {"weights": {"colorfulness": 1.0}},
            "objective": {"name": objective},
            "optimizer": {"minibatches": 1, "learning_rate": 3e-3},
            "lora": {"rank": 2, "alpha": 4},
            "run": {"updates": 2},
        },
        "test",
    )
