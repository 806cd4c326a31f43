"""SDXL: the UNet with a second text encoder, with size conditioning."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Inputs
from .unet import Unet


class Sdxl(Unet):
    def embed(self, prompts: Sequence[str], device: torch.device) -> Inputs:
        """An empty prompt is encoded as such, which is what ComfyUI does; diffusers' default would be zeros."""
        hidden, _, pooled, _ = self.pipeline.encode_prompt(list(prompts), None, device, 1, False)
        scale = self.pipeline.vae_scale_factor
        size = [side * scale for side in self.latent_shape[1:]]
        ids = torch.tensor([[*size, 0, 0, *size]], dtype=hidden.dtype, device=hidden.device)  # original, crop, target
        return {"encoder_hidden_states": hidden, "text_embeds": pooled, "time_ids": ids.repeat(len(hidden), 1)}

    def call(self, x: Tensor, t: Tensor, text: Inputs) -> Tensor:
        added = {name: text[name] for name in ("text_embeds", "time_ids")}
        out = self.denoiser(x, t, text["encoder_hidden_states"], added_cond_kwargs=added).sample
        return self.epsilon(out.float(), x, t)
