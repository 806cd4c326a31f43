"""Pipelines of full-size denoisers and VAEs with random weights, or tiny ones of the same classes.

Text encoders have the real widths and lengths but one or two layers: they are unloaded before training begins.
Sizes are those of the models' published configuration files.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from comfyui_pcpo.tiny.pipelines import MODELS
from trainer.policy.skeletons import SDXL_UNET, UNET, VAE

Sizes = dict[str, Any]
NOTHING: Any = None  # accepted by the classes, but not declared
CLIP_LENGTH, T5_LENGTH = 77, 512
SHAPES = FakeTensorMode(allow_non_fake_inputs=True)
"""Of all models without contents, so that they can be parts of one pipeline."""
TINY_UNET: Sizes = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": (2, 4),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "sample_size": 8,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
TINY_VAE: Sizes = {
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "sample_size": 16,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
SD35M: Sizes = {
    "sample_size": 128,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
}
TINY_SD35M: Sizes = {
    "sample_size": 8,
    "num_layers": 2,
    "num_attention_heads": 2,
    "caption_projection_dim": 128,
    "pos_embed_max_size": 8,
    "dual_attention_layers": (0,),
}
FLUX: Sizes = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
TINY_FLUX: Sizes = {
    "num_layers": 1,
    "num_single_layers": 2,
    "num_attention_heads": 1,
    "joint_attention_dim": 64,
}
FLUX_SHIFT: Sizes = {
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
}


def filled(make: Callable[[], nn.Module], empty: bool, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A model in `dtype` with small random weights, or `empty` with shapes only, which takes no memory."""
    if empty:
        with SHAPES:
            return _made(make, dtype)
    with torch.device("meta"):
        model = _made(make, dtype)
    model.to_empty(device="cpu")
    noise = torch.randn(2**16, generator=torch.Generator().manual_seed(0)) * 0.02
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        with torch.no_grad():
            if t.ndim < 2:
                t.fill_(1.0 if name.endswith("weight") else 0.0)
            else:  # repeated, because billions of random numbers take minutes
                t.view(-1).copy_(noise.repeat(-(-t.numel() // len(noise)))[: t.numel()])
    return model


def _made(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return make()
    finally:
        torch.set_default_dtype(before)


def clip(width: int, projection: bool = False) -> Any:
    tokenizer = clip_tokenizer()
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width, projection_dim=width,
        num_hidden_layers=2, num_attention_heads=width // 64, max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)


def clip_tokenizer() -> Any:
    tokenizer = transformers.CLIPTokenizer.from_pretrained(Path(MODELS) / "shared" / "tokenizer")
    tokenizer.model_max_length = CLIP_LENGTH
    return tokenizer


def t5(width: int = 4096) -> Any:
    library: Any = transformers  # the type stubs of T5 are incomplete
    config = library.T5Config(
        vocab_size=64, d_model=width, d_kv=64, d_ff=64, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu",
        is_encoder_decoder=False, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.T5EncoderModel(config)


def t5_tokenizer(length: int = T5_LENGTH) -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    library: Any = transformers
    return library.T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=length)


def vae(tiny: bool, empty: bool, **more: Any) -> Any:
    config = {k: v for k, v in VAE.items() if not k.startswith("_")} | more | (TINY_VAE if tiny else {})
    return filled(lambda: diffusers.AutoencoderKL(**config), empty, torch.float32)


def ddim_scheduler() -> Any:
    return diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip


def unet(config: dict[str, Any], tiny: bool, empty: bool) -> Any:
    config = {k: v for k, v in config.items() if not k.startswith("_")} | (TINY_UNET if tiny else {})
    if tiny and "transformer_layers_per_block" in config:
        config["transformer_layers_per_block"] = (1, 2)
    return filled(lambda: diffusers.UNet2DConditionModel(**config), empty)


def sd15(tiny: bool, empty: bool) -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=vae(tiny, empty), text_encoder=clip(768), tokenizer=clip_tokenizer(), unet=unet(UNET, tiny, empty),
        scheduler=ddim_scheduler(), safety_checker=NOTHING, feature_extractor=NOTHING, requires_safety_checker=False,
    )  # fmt: skip


def sdxl(tiny: bool, empty: bool) -> Any:
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(tiny, empty), text_encoder=clip(768), text_encoder_2=clip(1280, True), tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(), unet=unet(SDXL_UNET, tiny, empty), scheduler=ddim_scheduler(),
        add_watermarker=False,
    )  # fmt: skip


def sd35m(tiny: bool, empty: bool) -> Any:
    config = SD35M | (TINY_SD35M if tiny else {})
    return diffusers.StableDiffusion3Pipeline(
        vae=vae(tiny, empty, latent_channels=16, shift_factor=0.0609), tokenizer=clip_tokenizer(),
        transformer=filled(lambda: diffusers.SD3Transformer2DModel(**config), empty), text_encoder=clip(768, True),
        text_encoder_2=clip(1280, True), tokenizer_2=clip_tokenizer(), text_encoder_3=t5(), tokenizer_3=t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def flux(tiny: bool, empty: bool) -> Any:
    config = FLUX | (TINY_FLUX if tiny else {})
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, **FLUX_SHIFT),
        vae=vae(tiny, empty, latent_channels=16, shift_factor=0.1159), text_encoder=clip(768),
        tokenizer=clip_tokenizer(), text_encoder_2=t5(config["joint_attention_dim"]),
        tokenizer_2=t5_tokenizer(32 if tiny else T5_LENGTH),
        transformer=filled(lambda: diffusers.FluxTransformer2DModel(**config), empty),
    )  # fmt: skip


PIPELINES: dict[str, Callable[[bool, bool], Any]] = {"sd15": sd15, "sdxl": sdxl, "sd35m": sd35m, "flux": flux}
