"""The embedded models as ComfyUI classes: an MMDiT or a UNet, a CLIP text encoder and a TAESD-type VAE."""

import json
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_detection
import comfy.model_management as mm
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.taesd.taesd import TAESD, Clamp
from safetensors.torch import load_file
from torch import Tensor, nn

from comfyui_pcpo.tiny.pipelines import MODELS, SHARED, load_tiny_autoencoder

CLIP: dict[str, Any] = json.loads((SHARED / "text_encoder" / "config.json").read_text(encoding="utf-8"))
TEXT = {
    "bos": CLIP["bos_token_id"], "eos": CLIP["eos_token_id"], "length": CLIP["max_position_embeddings"],
    "width": CLIP["hidden_size"], "vocabulary": CLIP["vocab_size"],
}  # fmt: skip


class EmojiLatent(comfy.latent_formats.LatentFormat):
    """16 channels, neither scaled nor shifted."""

    latent_channels = 16
    scale_factor = 1.0


class EmojiFlow(comfy.supported_models.SD3):
    latent_format = EmojiLatent


class EmojiEps(comfy.supported_models_base.BASE):
    unet_extra_config = {"num_heads": 4, "num_head_channels": -1}  # noqa: RUF012
    latent_format = EmojiLatent
    memory_usage_factor = 1.0

    def inpaint_model(self) -> bool:
        return False


EPS_CONFIG: dict[str, Any] = {
    "image_size": 16,
    "in_channels": 16,
    "out_channels": 16,
    "model_channels": 32,
    "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 3, 4],
    "transformer_depth": [0, 1, 1],
    "transformer_depth_output": [0, 0, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": CLIP["hidden_size"],
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "legacy": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
}


class EmojiTokenizer(comfy.sd1_clip.SDTokenizer):
    def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None):
        super().__init__(
            str(SHARED / "tokenizer"), TEXT["length"], embedding_directory=embedding_directory,
            embedding_size=TEXT["width"], tokenizer_data=tokenizer_data or {},
        )  # fmt: skip


class EmojiTokens(comfy.sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None):
        super().__init__(embedding_directory, tokenizer_data or {}, tokenizer=EmojiTokenizer)


class EmojiEncoder(comfy.sd1_clip.SDClipModel):
    """The two-layer text encoder: last hidden state (emoji-eps), or the one before it without norm (emoji-flow)."""

    def __init__(self, flow: bool, device: Any, dtype: Any, model_options: dict[str, Any]):
        config = {
            key: CLIP[key]
            for key in (
                "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
                "max_position_embeddings", "eos_token_id",
            )
        }  # fmt: skip
        tokens = {"start": TEXT["bos"], "end": TEXT["eos"], "pad": TEXT["eos"]}
        super().__init__(
            device=device, dtype=dtype, max_length=TEXT["length"], textmodel_json_config=config, special_tokens=tokens,
            layer_norm_hidden_state=not flow, model_options=model_options,
        )  # fmt: skip
        table = self.operations.Embedding(TEXT["vocabulary"], TEXT["width"], device=device, dtype=dtype)
        self.transformer.text_model.embeddings.token_embedding = table
        if flow:  # SDClipModel asserts against -2 of two layers, so it is set after construction
            self.layer, self.layer_idx = "hidden", -2
            self.options_default = (self.layer, self.layer_idx, self.return_projected_pooled)


class EmojiText(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None):
        def make(device: Any, dtype: Any, model_options: dict[str, Any]) -> EmojiEncoder:
            return EmojiEncoder(False, device, dtype, model_options)

        super().__init__(device, dtype, model_options or {}, clip_model=make)


class EmojiFlowText(comfy.sd1_clip.SD1ClipModel):
    """SD3 concatenates two text encoders; the embedded model uses one of them twice."""

    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None):
        def make(device: Any, dtype: Any, model_options: dict[str, Any]) -> EmojiEncoder:
            return EmojiEncoder(True, device, dtype, model_options)

        super().__init__(device, dtype, model_options or {}, clip_model=make)

    def encode_token_weights(self, token_weight_pairs: Any) -> tuple[Tensor, ...]:
        hidden, pooled = super().encode_token_weights(token_weight_pairs)
        return torch.cat([hidden, hidden], -1), torch.cat([pooled, pooled], -1)


def load_embedded(name: str) -> tuple[ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """MODEL, CLIP and VAE of an embedded model."""
    with torch.inference_mode(False), torch.no_grad():
        vae = load_vae()
        model = load_model(name)
        latent = model.model.latent_format
        latent.latent_rgb_factors, latent.latent_rgb_factors_bias = rgb_factors(vae)
        return model, load_clip(name), vae


def load_model(name: str, disable_dynamic: bool = False) -> ModelPatcher:
    """The denoiser; ComfyUI calls this for a copy. `disable_dynamic` has no effect: it never loads dynamically."""
    part = "transformer" if name == "emoji-flow" else "unet"
    state = _floats(MODELS / name / part / "diffusion_pytorch_model.safetensors")
    if name == "emoji-flow":
        state = comfy.model_detection.convert_diffusers_mmdit(state, "")
        config = EmojiFlow(comfy.model_detection.detect_unet_config(state, ""))
    else:
        names = comfy.utils.unet_to_diffusers(EPS_CONFIG)
        state = {names[k]: v for k, v in state.items()}
        config = EmojiEps(EPS_CONFIG)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model(state, "")
    model.load_model_weights(state, "")
    if name == "emoji-eps":
        set_groups(model)
    patcher = ModelPatcher(model, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device())
    patcher.cached_patcher_init = (load_model, (name,))
    patcher.set_attachments("pcpo_model", name)
    return patcher


def set_groups(model: nn.Module) -> None:
    """ComfyUI's UNet has 32 groups in every norm; in 32 channels that would be one group per channel."""
    path = MODELS / "emoji-eps" / "unet" / "config.json"
    groups = json.loads(path.read_text(encoding="utf-8"))["norm_num_groups"]
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = groups


def load_clip(name: str) -> comfy.sd.CLIP:
    target = comfy.supported_models_base.ClipTarget(EmojiTokens, EmojiFlowText if name == "emoji-flow" else EmojiText)
    state = _floats(SHARED / "text_encoder" / "model.safetensors")
    count = sum(t.numel() for t in state.values())
    clip = comfy.sd.CLIP(target, parameters=count, model_options={"dtype": torch.float32}, disable_dynamic=True)
    clip.cond_stage_model.clip_l.transformer.load_state_dict(state, strict=True)
    return clip


def load_vae() -> comfy.sd.VAE:
    """A TAESD of ComfyUI's with the layers of ours, which are fewer and narrower."""
    ours = load_tiny_autoencoder()
    stock = TAESD(latent_channels=EmojiLatent.latent_channels).state_dict()
    blank = {key: torch.zeros_like(value) for key, value in stock.items()}
    vae = comfy.sd.VAE(sd={**blank, "vae_scale": torch.tensor(1.0)}, dtype=torch.float32)
    taesd = vae.first_stage_model
    taesd.taesd_encoder = ours.encoder.layers
    taesd.taesd_decoder = nn.Sequential(Clamp(), *ours.decoder.layers)
    return vae


def rgb_factors(vae: comfy.sd.VAE) -> tuple[list[list[float]], list[float]]:
    """Linear map from latent channels to RGB for previews, fitted to images of coarse colored patches."""
    patches = torch.rand(20, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(patches, size=(64, 64), mode="bilinear").movedim(1, -1)
    latents = vae.encode(images).cpu().movedim(1, -1).flatten(0, 2)
    rgb = torch.nn.functional.avg_pool2d(images.movedim(-1, 1), 8).movedim(1, -1).flatten(0, 2)
    known = torch.cat([latents, torch.ones(len(latents), 1)], 1)
    fit = torch.linalg.lstsq(known, 2 * rgb - 1).solution
    return fit[:-1].tolist(), fit[-1].tolist()


def _floats(path: Path) -> dict[str, Tensor]:
    return {k: v.float() for k, v in load_file(path).items()}
