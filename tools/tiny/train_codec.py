"""Stages `codec` and `decoder`: the autoencoder learns from crops of drawings."""

import copy
import json
from typing import Any

import torch
from torch import Tensor, nn

from tools.tiny.codec import codec_loss, encode, make_autoencoder, principal_components, psnr, start_encoder
from tools.tiny.data import Drawings, draw_scenes
from tools.tiny.fit import StageSettings, batch_indices, fit
from tools.tiny.folders import Folders
from tools.tiny.latents import load_autoencoder

CROP = 64
CODEC_DRAWINGS = 3000


def crops(drawings: Drawings, index: Tensor) -> Tensor:
    """Random squares of the drawings, (B,) -> (B, 3, 64, 64) in [-1, 1]."""
    span = drawings.pixels.shape[-1] - CROP + 1
    corners = torch.randint(span, (len(index), 2)).tolist()
    cut = [drawings.pixels[n, :, y : y + CROP, x : x + CROP] for n, (y, x) in zip(index.tolist(), corners, strict=True)]
    return torch.stack(cut).float().div_(127.5).sub_(1)


def train_codec(settings: StageSettings, folders: Folders) -> None:
    """Both halves, from principal components."""
    drawings = draw_scenes(CODEC_DRAWINGS, seed=0)
    vae = make_autoencoder()
    start_encoder(vae, *principal_components(drawings.images(torch.arange(min(1000, len(drawings.scenes))))))
    fit_autoencoder("codec", vae, drawings, settings, folders)


def train_decoder(settings: StageSettings, folders: Folders) -> None:
    """The decoder alone, further: the latents, and so the generators that learned from them, stay the same."""
    vae = load_autoencoder(folders)
    vae.decoder.requires_grad_(True)
    fit_autoencoder("decoder", vae, draw_scenes(CODEC_DRAWINGS, seed=1), settings, folders)


def fit_autoencoder(name: str, vae: Any, drawings: Drawings, settings: StageSettings, folders: Folders) -> None:
    vae.to(memory_format=torch.channels_last)
    test = draw_scenes(settings.at_most(48), seed=100).every_image
    order = batch_indices(len(drawings.scenes), settings.batch)

    def loss() -> Tensor:
        return codec_loss(vae, crops(drawings, next(order)))

    @torch.no_grad()
    def report(average: Any) -> str:
        save_half(average, folders)
        with torch.autocast("cpu", torch.bfloat16):
            latents = encode(average, test).float()
            decoded = average.decode(latents).sample.float()
        return f"{psnr(decoded, test):.2f} dB held out, latents of std {latents.std():.2f}"

    fit(name, vae, loss, settings, report)


def save_half(average: nn.Module, folders: Folders) -> None:
    copy.deepcopy(average).half().save_pretrained(folders.shared / "vae")  # type: ignore[operator]
    path = folders.shared / "vae" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("block_out_channels", None)  # diffusers writes it, and warns of it when it reads it
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
