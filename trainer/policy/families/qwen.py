"""Qwen-Image: FLUX's patches, one language model as text encoder, guidance that keeps each token's length."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from comfyui_pcpo.lora.formats import Family

from .base import Inputs
from .flux import Flux, pack, unpack

QWEN_TOKENS = 512


class QwenImage(Flux):
    layout: Family = "qwen"
    pretends = False  # its rotary tables are complex, of which PyTorch makes no contentless copy

    def embed(self, prompts: Sequence[str], device: torch.device) -> Inputs:
        hidden, mask = self.pipeline.encode_prompt(list(prompts), device, max_sequence_length=QWEN_TOKENS)
        return masked(hidden, mask)

    def call(self, x: Tensor, t: Tensor, text: Inputs) -> Tensor:
        h, w = x.shape[-2] // 2, x.shape[-1] // 2
        out = self.denoiser(pack(x), timestep=t / 1000, img_shapes=[[(1, h, w)]] * len(x), **text)
        return unpack(out.sample.float(), h, w)

    def guide(self, uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
        h, w = cond.shape[-2] // 2, cond.shape[-1] // 2
        tokens = pack(super().guide(uncond, cond, scale))
        return unpack(tokens * (pack(cond).norm(dim=-1, keepdim=True) / tokens.norm(dim=-1, keepdim=True)), h, w)

    def decode(self, latents: Tensor) -> Tensor:
        return decode_frame(self.pipeline.vae, latents)


def masked(hidden: Tensor, mask: Tensor | None) -> Inputs:
    """Text inputs of Qwen-Image's transformers; the pipelines leave the mask out where all prompts have one length."""
    if mask is None:
        mask = hidden.new_ones(hidden.shape[:2], dtype=torch.long)
    return {"encoder_hidden_states": hidden, "encoder_hidden_states_mask": mask}


def decode_frame(vae: Any, latents: Tensor) -> Tensor:
    """One frame of a video's VAE, (B, C, H, W) -> (B, 3, 8 H, 8 W)."""
    mean, std = (latents.new_tensor(v).view(1, -1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    return vae.decode((latents * std + mean)[:, :, None]).sample[:, :, 0]
