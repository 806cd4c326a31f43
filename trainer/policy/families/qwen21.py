"""Qwen-Image 2.1: one causal stream of words and image on a VAE of 16 pixels and four channels, without patches."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comfyui_pcpo.lora.formats import Family

from .base import Inputs, PipelineAdapter, resolution_mu
from .qwen import decode_frame, masked

QWEN21_SIDE = 64  # the pipeline's own size, 1024 pixels, which no part of it records


class QwenImage21(PipelineAdapter):
    layout: Family = "qwen"
    pretends = False  # its rotary tables are complex, too

    def default_side(self) -> int:
        return QWEN21_SIDE

    def space(self, scheduler: Any, steps: int, mu: float | None) -> None:
        """The levels that the model's author configured, where they are of so many steps; a token is one position."""
        mu = resolution_mu(self.latent_shape, 1, scheduler.config)
        own = self.pipeline.config.sample_sigmas
        sigmas = own if own is not None and len(own) == steps else np.linspace(1.0, 1 / steps, steps)
        scheduler.set_timesteps(sigmas=sigmas, mu=mu)

    def embed(self, prompts: Sequence[str], device: torch.device) -> Inputs:
        hidden, mask, _ = self.pipeline.encode_prompt(list(prompts), device=device)
        return masked(hidden, mask)

    def call(self, x: Tensor, t: Tensor, text: Inputs) -> Tensor:
        h, w = x.shape[-2:]
        words = text["encoder_hidden_states_mask"]
        slots = torch.cat([torch.zeros_like(words), words.new_ones(len(x), h * w // 4)], 1)  # 2 x 2 tokens each
        out = self.denoiser(
            x.flatten(2).transpose(1, 2), timestep=t / 1000, img_shapes=[[(1, h, w)]] * len(x), img_mask=slots.bool(),
            **text,
        ).sample  # fmt: skip
        return out[:, -h * w :].float().transpose(1, 2).unflatten(2, (h, w))

    def decode(self, latents: Tensor) -> Tensor:
        """Without transparency, the VAE's fourth channel."""
        return decode_frame(self.pipeline.vae, latents)[:, :3]
