"""JPEG file size, DDPO's rewards without a network."""

import io

import torch
from PIL import Image
from torch import Tensor

from comfyui_pcpo.reward.base import Reward

QUALITY = 95


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """File size in kB = 1000 bytes at quality 95, uint8 (B, H, W, 3) -> (B,).

    Black et al. 2023, Training Diffusion Models with Reinforcement Learning, section 5.1
    """
    sizes = []
    for image in images.cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="JPEG", quality=QUALITY)
        sizes.append(file.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32)


class JpegCompressibility(Reward):
    """Negative file size in kB: favors smooth, empty images."""

    name = "jpeg_compressibility"
    needs_prompt = False
    typical_range = (-150.0, -1.0)

    def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        return -jpeg_kilobytes(images)


class JpegIncompressibility(Reward):
    """File size in kB: favors busy, noisy images."""

    name = "jpeg_incompressibility"
    needs_prompt = False
    typical_range = (1.0, 300.0)

    def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        return jpeg_kilobytes(images)
