"""FLUX.2: its latents are 2 x 2 patches of the VAE's, normalised; three layers of one language model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from comfyui_pcpo.lora.formats import Family

from .base import Inputs, PipelineAdapter
from .flux import position_ids


class Flux2(PipelineAdapter):
    """dev takes guidance as an input, klein's base model has a second branch, and klein itself has neither."""

    layout: Family = "flux2"
    token = 1

    def pixels(self) -> int:
        return 2 * self.pipeline.vae_scale_factor

    def default_side(self) -> int:
        return self.pipeline.default_sample_size // 2

    def space(self, scheduler: Any, steps: int, mu: float | None) -> None:
        """The shift depends on the number of steps, too."""
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        _, h, w = self.latent_shape
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=compute_empirical_mu(h * w, steps))

    def embed(self, prompts: Sequence[str], device: torch.device) -> Inputs:
        hidden, _ = self.pipeline.encode_prompt(list(prompts), device=device)
        return {"encoder_hidden_states": hidden}

    def call(self, x: Tensor, t: Tensor, text: Inputs) -> Tensor:
        h, w = x.shape[-2:]
        guidance = torch.full_like(t, self.rollout.guidance) if self.denoiser.config.guidance_embeds else None
        words = torch.arange(text["encoder_hidden_states"].shape[1], device=x.device)
        out = self.denoiser(
            x.flatten(2).transpose(1, 2),
            timestep=t / 1000,
            guidance=guidance,
            img_ids=F.pad(position_ids(h, w, x.device), (0, 1)),  # frame, row, column, word
            txt_ids=F.pad(words[:, None], (3, 0)),
            **text,
        )
        return out.sample.float().transpose(1, 2).unflatten(2, (h, w))

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        mean, variance = (v.view(1, -1, 1, 1) for v in (vae.bn.running_mean, vae.bn.running_var))
        z = latents * (variance + vae.config.batch_norm_eps).sqrt() + mean
        return vae.decode(F.pixel_shuffle(z, 2)).sample
