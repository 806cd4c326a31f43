"""The latent codec: 8x, 16 channels, an AutoencoderTiny whose encoder starts as the principal components of patches.

The encoder's strided convolutions can move each 2x2 block of pixels into channels without loss: 3 -> 12 -> 48 channels,
and the last one then computes any linear map of an 8x8 patch. Started so, the autoencoder needs no second encoder to
imitate. Widths and depths fit inside the common TAESD layout (64 wide, 3-3-3-1 blocks) when padded with zeros. A block
at full resolution would double the decoder's cost.
"""

from typing import Any

import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn
from torch.nn import functional as F

PATCH, CHANNELS, WIDTH = 8, 16, 48
NOISE = 0.1  # on the latents while the decoder learns: it meets the generators' small errors later


def principal_components(images: Tensor) -> tuple[Tensor, Tensor]:
    """Map (16, 192) of [0, 1] patches to latents and its bias (16,); channels by std^-0.75, together of unit std."""
    patches = F.unfold(images * 0.5 + 0.5, PATCH, stride=PATCH).transpose(1, 2).reshape(-1, 3 * PATCH**2).double()
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((patches - mean).T))
    values, vectors = values.flip(0)[:CHANNELS], vectors.flip(1)[:, :CHANNELS]
    scale = values.sqrt().pow(-0.75)
    scale = scale / (values * scale.square()).mean().sqrt()
    down = (vectors * scale).T
    return down.float(), -(down @ mean).float()


def make_autoencoder() -> Any:
    return AutoencoderTiny(
        encoder_block_out_channels=(WIDTH,) * 4,
        decoder_block_out_channels=(WIDTH,) * 4,
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(3, 3, 1, 0),
        latent_channels=CHANNELS,
        scaling_factor=1.0,
    )


@torch.no_grad()
def start_encoder(vae: Any, down: Tensor, bias: Tensor) -> None:
    """Make the encoder compute `down @ patch + bias` exactly; every block starts as ReLU(x), x >= 0 here.

    Between the last stride and the last convolution, a ReLU follows: latents pass it as positive and negative parts.
    """
    conv_in, _, half, block2, quarter, block3, eighth, block4, conv_out = vae.encoder.layers
    for conv, copied in ((conv_in, 3), (half, 12), (quarter, 48), (eighth, 2 * CHANNELS), (conv_out, WIDTH)):
        conv.weight[:copied] = 0
    for channel in range(3):
        conv_in.weight[channel, channel, 1, 1] = 1
    conv_in.bias[:3] = 0
    for conv, count in ((half, 3), (quarter, 12)):
        for row, column, channel in [(r, c, n) for r in range(2) for c in range(2) for n in range(count)]:
            conv.weight[(2 * row + column) * count + channel, channel, 1 + row, 1 + column] = 1
    # channel order after two steps: (row, column) of the 4x4 block's quadrant, then of the pixel in it, then RGB
    patch = down.view(CHANNELS, 3, 2, 2, 2, 2, 2, 2)  # colour, row (3 bits), column (3 bits)
    taps = patch.permute(0, 3, 6, 4, 7, 1, 2, 5).reshape(CHANNELS, 48, 2, 2)
    eighth.weight[:CHANNELS, :, 1:, 1:] = taps
    eighth.weight[CHANNELS : 2 * CHANNELS, :, 1:, 1:] = -taps
    for channel in range(CHANNELS):
        conv_out.weight[channel, channel, 1, 1] = 1
        conv_out.weight[channel, CHANNELS + channel, 1, 1] = -1
    conv_out.bias.copy_(bias)
    for block in (vae.encoder.layers[1], block2, block3, block4):
        block.conv[-1].weight.zero_()
        block.conv[-1].bias.zero_()
    first = vae.encoder.layers[1]
    first.requires_grad_(False)  # full-resolution convolutions cost most and gain least: this block stays ReLU(x)
    for parameter in first.parameters():
        parameter.zero_()


def encode(vae: Any, images: Tensor) -> Tensor:
    """vae.encode without the unused convolutions of its first block, (B, 3, H, W) -> (B, 16, H/8, W/8)."""
    layers = vae.encoder.layers
    x = F.relu(layers[0](images * 0.5 + 0.5))
    for layer in layers[2:]:
        x = layer(x)
    return x


def reconstruction_error(decoded: Tensor, images: Tensor) -> Tensor:
    """Absolute plus squared plus edge error; images in [-1, 1]."""
    error = decoded - images
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + edges


def codec_loss(vae: nn.Module, images: Tensor) -> Tensor:
    """Error of decoded noisy latents, which are held at zero mean and unit mean square."""
    latents = encode(vae, images)
    noisy = latents + NOISE * torch.randn_like(latents)
    spread = (latents.float().square().mean() - 1).square() + latents.float().mean((0, 2, 3)).square().mean()
    return reconstruction_error(vae.decode(noisy).sample.float(), images) + 0.1 * spread  # type: ignore[operator]


def psnr(decoded: Tensor, images: Tensor) -> float:
    """Peak signal-to-noise ratio in dB; images in [-1, 1], decoded ones clamped."""
    error = (decoded.clamp(-1, 1) - images) / 2
    return -10 * float(error.square().mean().log10())
