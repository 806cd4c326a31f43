"""Krea 2: FLUX's patches on Qwen-Image's VAE, and several layers of one language model for each word."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from comfyui_pcpo.lora.formats import Family

from .base import Inputs, PipelineAdapter, resolution_mu
from .flux import pack, position_ids, unpack
from .qwen import decode_frame

KREA_SIDE = 128  # the pipeline's own size, 1024 pixels, which no part of it records
DISTILLED_MU = 1.15
LONGEST = {"max_image_seq_len": 6400}  # the pipeline's default where the scheduler has none


class Krea2(PipelineAdapter):
    """Guidance of scale s in the pipeline is `rollout.cfg` s + 1 here, as in other pipelines and in ComfyUI."""

    layout: Family = "krea2"

    def channels(self) -> int:
        return self.denoiser.config.in_channels // 4

    def default_side(self) -> int:
        return KREA_SIDE

    def space(self, scheduler: Any, steps: int, mu: float | None) -> None:
        by_size = resolution_mu(self.latent_shape, self.token, LONGEST | dict(scheduler.config))
        mu = DISTILLED_MU if self.pipeline.config.is_distilled else by_size
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)

    def embed(self, prompts: Sequence[str], device: torch.device) -> Inputs:
        hidden, mask = self.pipeline.encode_prompt(list(prompts), device=device)
        return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}

    def call(self, x: Tensor, t: Tensor, text: Inputs) -> Tensor:
        h, w = x.shape[-2] // 2, x.shape[-1] // 2
        words = text["encoder_hidden_states"].shape[1]
        ids = F.pad(position_ids(h, w, x.device), (0, 0, words, 0))  # words are at the origin
        return unpack(self.denoiser(pack(x), timestep=t / 1000, position_ids=ids, **text).sample.float(), h, w)

    def decode(self, latents: Tensor) -> Tensor:
        return decode_frame(self.pipeline.vae, latents)
