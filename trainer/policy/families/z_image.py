"""Z-Image: one stream of image and text, whose texts keep their own lengths; time and velocity the other way round."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comfyui_pcpo.lora.formats import Family

from .base import Inputs, PipelineAdapter

Z_IMAGE_TOKENS = 512
Z_IMAGE_SIDE = 128  # the pipeline's own size, 1024 pixels, which no part of it records


class ZImage(PipelineAdapter):
    """Guidance of scale s in the pipeline is `rollout.cfg` s + 1 here, as in other pipelines and in ComfyUI."""

    layout: Family = "z_image"

    def default_side(self) -> int:
        return Z_IMAGE_SIDE

    def space(self, scheduler: Any, steps: int, mu: float | None) -> None:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)

    def embed(self, prompts: Sequence[str], device: torch.device) -> Inputs:
        """One by one and without padding: the pipeline cuts its padding by a mask, for which a GPU has to be waited."""
        return {"cap_feats": [self._features(prompt, device) for prompt in prompts]}

    def _features(self, prompt: str, device: torch.device) -> Tensor:
        """The encoder's last layer but one, as the answer to the prompt would be begun, -> (L, D)."""
        tokenizer, encoder = self.pipeline.tokenizer, self.pipeline.text_encoder
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=True)
        ids = tokenizer([text], truncation=True, max_length=Z_IMAGE_TOKENS, return_tensors="pt").input_ids
        return encoder(input_ids=ids.to(device), output_hidden_states=True).hidden_states[-2][0]

    def call(self, x: Tensor, t: Tensor, text: Inputs) -> Tensor:
        """The model's time runs from noise at 0 to the image at 1, and its output points to the image."""
        images = list(x[:, :, None].unbind())
        out = self.denoiser(images, (1000 - t) / 1000, **text).sample
        return -torch.stack(out).float()[:, :, 0]
