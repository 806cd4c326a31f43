"""The latent codec: 8x, 16 channels. A closed-form linear encoder fixes the latents, a TAESD-type pair imitates it.

The generators can train on the linear latents at once; the decoder learns meanwhile. Widths and depths are chosen
so that the autoencoder fits inside the common TAESD layout (64 wide, 3-3-3-1 blocks) when padded with zeros.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderTiny
from torch import Tensor
from torch.nn import functional as F

PATCH, CHANNELS = 8, 16


@dataclass
class LinearCodec:
    """z = (patch - mean) @ down; patch = z @ up + mean, for 8x8x3 patches."""

    mean: Tensor  # (192,)
    down: Tensor  # (192, 16)
    up: Tensor  # (16, 192)

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 16, H/8, W/8)."""
        patches = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)
        z = (patches - self.mean) @ self.down
        return z.transpose(1, 2).unflatten(2, (images.shape[2] // PATCH, images.shape[3] // PATCH))

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 16, h, w) -> (B, 3, 8h, 8w)."""
        patches = latents.flatten(2).transpose(1, 2) @ self.up + self.mean
        size = (latents.shape[2] * PATCH, latents.shape[3] * PATCH)
        return F.fold(patches.transpose(1, 2), size, PATCH, stride=PATCH)


def fit_linear(images: Tensor) -> LinearCodec:
    """Principal components of the patches, each scaled by std^-0.75, all together to unit standard deviation."""
    patches = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2).reshape(-1, 3 * PATCH**2).double()
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((patches - mean).T))
    values, vectors = values.flip(0)[:CHANNELS], vectors.flip(1)[:, :CHANNELS]
    scale = values.sqrt() ** -0.75
    scale = scale / ((values * scale**2).mean().sqrt())
    down, up = vectors * scale, (vectors / scale).T
    return LinearCodec(mean.float(), down.float(), up.float())


def make_autoencoder() -> AutoencoderTiny:
    return AutoencoderTiny(
        latent_channels=CHANNELS,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(3, 2, 1, 1),
    )


def decoder_loss(vae: Any, latents: Tensor, images: Tensor) -> Tensor:
    """Absolute plus edge error of decoded pictures; images in [-1, 1]."""
    out = vae.decode(latents).sample
    error = out - images
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + edges
