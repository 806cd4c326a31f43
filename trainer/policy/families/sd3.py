"""SD3 and SD3.5: a transformer on velocity, two CLIP text encoders and, if it is there, T5."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Inputs, PipelineAdapter

T5_LENGTH = 256


class Sd3(PipelineAdapter):
    def longest_side(self) -> int:
        return self.denoiser.config.pos_embed_max_size * self.denoiser.config.patch_size

    def embed(self, prompts: Sequence[str], device: torch.device) -> Inputs:
        """Without T5 its tokens are left out, as ComfyUI does; diffusers would pad with 256 rows of zeros."""
        pipe = self.pipeline
        length = 0 if pipe.text_encoder_3 is None else min(T5_LENGTH, pipe.tokenizer_3.model_max_length)
        hidden, _, pooled, _ = pipe.encode_prompt(
            list(prompts), None, None, device=device, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

    def call(self, x: Tensor, t: Tensor, text: Inputs) -> Tensor:
        return self.denoiser(x, timestep=t, **text).sample.float()
