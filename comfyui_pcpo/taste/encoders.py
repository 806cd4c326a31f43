"""Frozen image features that a taste is learned on: a network's, and statistics of the colours.

Networks are trained to overlook what people often vote on: how bright, colourful or busy an image is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_pcpo.reward.base import RewardSettings
from comfyui_pcpo.reward.diversity import Diversity
from comfyui_pcpo.reward.weights.preprocess import crop_round
from comfyui_pcpo.taste.votes import VoteError
from comfyui_pcpo.tiny.align import load_image_encoder
from comfyui_pcpo.tiny.pipelines import MODELS

PROBE_SIDE = 96
COLOR_STATISTICS = 42


@dataclass(frozen=True)
class Encoder:
    """A name, and a function from images uint8 (B, H, W, 3) to a network's features (B, K).

    `network` is absent where a host keeps it; it may be moved to another device.
    """

    name: str
    encode: Callable[[Tensor], Tensor]
    network: nn.Module | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The network's features and the colour statistics, uint8 (B, H, W, 3) -> (B, K + COLOR_STATISTICS)."""
        return torch.cat([self.encode(images).detach().float().cpu(), color_statistics(images.cpu())], 1)

    def probe(self) -> Tensor:
        """Features of a fixed image, (D,), which identify the encoder that a taste was learned on."""
        ramp = torch.linspace(0, 255, PROBE_SIDE)
        image = torch.stack([ramp.expand(PROBE_SIDE, -1), ramp[:, None].expand(-1, PROBE_SIDE), ramp.flip(0).expand(
            PROBE_SIDE, -1)], -1)  # fmt: skip
        return self(image.round().to(torch.uint8)[None])[0]


def color_statistics(images: Tensor) -> Tensor:
    """Means in quarters, spread and edges of six channels, uint8 (B, H, W, 3) -> (B, 42).

    The channels are red, green, blue, the opponent colours of Hasler and Suesstrunk 2003 (see the reward colorfulness),
    and chroma.
    """
    x = images.permute(0, 3, 1, 2).float() / 255
    r, g, b = x.unbind(1)
    channels = torch.stack([r, g, b, r - g, (r + g) / 2 - b, x.amax(1) - x.amin(1)], 1)
    means = F.adaptive_avg_pool2d(channels, 2).flatten(1)
    edges = [channels.diff(dim=axis).abs().flatten(2).mean(2) for axis in (2, 3)]
    return torch.cat([means, channels.flatten(2).std(2, correction=0), *edges], 1)


def tiny_encoder(settings: RewardSettings) -> Encoder:
    """The features of the embedded emoji-align; for images of the embedded models."""
    from comfyui_pcpo.reward.alignment import encoder_input

    model = load_image_encoder(MODELS / "emoji-align").to(settings.device)
    return Encoder("emoji-align", lambda images: model.encode(encoder_input(images.to(device_of(model)))), model)


def clip_encoder(settings: RewardSettings) -> Encoder:
    """The normalised image embedding of OpenAI's CLIP ViT-L/14, whose weights several rewards share."""
    model = cast("nn.Module", Diversity(settings).load().model)  # whose network is the vision tower alone

    def encode(images: Tensor) -> Tensor:
        pixels = crop_round(images.to(device_of(model))).to(settings.dtype)
        return F.normalize(model(pixels).float(), dim=-1)

    return Encoder("clip-vit-l-14", encode, model)


ENCODERS = {"emoji-align": tiny_encoder, "clip-vit-l-14": clip_encoder}


def device_of(model: nn.Module) -> torch.device:
    """Where a network is now."""
    return next(model.parameters()).device


def load_encoder(name: str, settings: RewardSettings) -> Encoder:
    """An encoder by its name. Raises VoteError for an unknown one."""
    if name not in ENCODERS:
        raise VoteError(f"{name!r} is not a known image encoder. Use one of {', '.join(ENCODERS)}.")
    return ENCODERS[name](settings)
