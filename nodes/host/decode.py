"""Images from latents by a ComfyUI VAE."""

from typing import Any

import torch
from torch import Tensor


def decode_images(vae: Any, samples: Tensor) -> Tensor:
    """Latents (B, C, H, W), or (B, C, 1, H, W) of a video model, -> ordinary tensor, float (B, H, W, 3)."""
    with torch.inference_mode():  # in which ComfyUI moves its models
        images = vae.decode(samples)
    return images.reshape(-1, *images.shape[-3:])[..., :3].clone()
