"""Degraded copies of the drawings, for emoji-polish to learn from."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tools.tiny.codec import encode

DEGRADATIONS = ("blur", "noise", "ghost", "fade", "codec")


def degrade(image: Tensor, amount: float, kind: str, vae: Any) -> Tensor:
    """A copy of (3, H, W) in [-1, 1], degraded by `amount` from 0 (not at all) to 1."""
    side = image.shape[-1]
    if kind == "blur":
        size = max(8, round(side * (1 - 0.85 * amount)))
        small = F.interpolate(image[None], (size, size), mode="bilinear", antialias=True)
        return F.interpolate(small, image.shape[-2:], mode="bicubic")[0].clamp(-1, 1)
    if kind == "noise":
        return (image + 0.5 * amount * torch.randn_like(image)).clamp(-1, 1)
    if kind == "ghost":  # a second, moved copy shines through
        right, down = torch.randint(side // 20, side // 5, (2,)).tolist()
        return image.lerp(image.roll((down, right), (1, 2)), 0.5 * amount)
    if kind == "fade":
        return image * (1 - 0.7 * amount) + 0.3 * amount
    latents = encode(vae, image[None])  # the smear of latents that are off
    return vae.decode(latents + amount * torch.randn_like(latents)).sample[0].clamp(-1, 1)


@torch.no_grad()
def degraded(images: Tensor, vae: Any) -> tuple[Tensor, Tensor]:
    """Copies of (B, 3, H, W), a quarter of them as they were, and how clean each still is, (B,) in [0, 1]."""
    amounts = torch.rand(len(images)) * (torch.rand(len(images)) > 0.25)
    kinds = torch.randint(len(DEGRADATIONS), (len(images),)).tolist()
    copies = [
        degrade(image, amount, DEGRADATIONS[kind], vae) if amount else image
        for image, amount, kind in zip(images, amounts.tolist(), kinds, strict=True)
    ]
    return torch.stack([copy.float() for copy in copies]), 1 - amounts
