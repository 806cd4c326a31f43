"""FLUX.1: a transformer on 2 x 2 patches, CLIP and T5, guidance as an input instead of a second branch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from comfyui_pcpo.lora.formats import Family

from .base import Inputs, PipelineAdapter

T5_TOKENS = 512


class Flux(PipelineAdapter):
    layout: Family = "flux"

    def channels(self) -> int:
        return self.denoiser.config.in_channels // 4

    def default_side(self) -> int:
        return self.pipeline.default_sample_size

    def space(self, scheduler: Any, steps: int, mu: float | None) -> None:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)

    def embed(self, prompts: Sequence[str], device: torch.device) -> Inputs:
        length = min(T5_TOKENS, self.pipeline.tokenizer_2.model_max_length)
        hidden, pooled, _ = self.pipeline.encode_prompt(list(prompts), None, device=device, max_sequence_length=length)
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

    def call(self, x: Tensor, t: Tensor, text: Inputs) -> Tensor:
        h, w = x.shape[-2] // 2, x.shape[-1] // 2
        guidance = torch.full_like(t, self.rollout.guidance) if self.denoiser.config.guidance_embeds else None
        txt_ids = torch.zeros(text["encoder_hidden_states"].shape[1], 3, device=x.device)
        out = self.denoiser(
            pack(x), timestep=t / 1000, guidance=guidance, img_ids=position_ids(h, w, x.device), txt_ids=txt_ids, **text
        )
        return unpack(out.sample.float(), h, w)


def pack(x: Tensor) -> Tensor:
    """2 x 2 patches as tokens, (B, C, H, W) -> (B, H W / 4, 4 C)."""
    return F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """The inverse of `pack`, h and w in tokens, (B, h w, 4 C) -> (B, C, 2 h, 2 w)."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (h, w)), 2)


def position_ids(h: int, w: int, device: torch.device) -> Tensor:
    """Row and column of each token, -> (h w, 3)."""
    rows, columns = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).float()
