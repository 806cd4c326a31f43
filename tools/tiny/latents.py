"""The latents of the drawings, encoded once and kept in the work folder."""

import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from comfyui_pcpo.tiny import captions
from comfyui_pcpo.tiny.captions import Scene
from tools.tiny import data, draw
from tools.tiny.codec import encode
from tools.tiny.data import draw_scenes
from tools.tiny.fit import StageSettings
from tools.tiny.folders import Folders

SHARD = 3000  # drawings in memory at a time


@dataclass
class Latents:
    """Latents (N, 16, 16, 16) in float16 and the scenes that they show."""

    values: Tensor
    scenes: list[Scene]


def load_autoencoder(folders: Folders) -> Any:
    vae: Any = AutoencoderTiny.from_pretrained(folders.shared / "vae", torch_dtype=torch.float32)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_drawings(vae: Any, number: int, seed: int) -> Latents:
    """Draw `number` images and encode them."""
    drawings = draw_scenes(number, seed)
    parts = []
    for index in torch.arange(number).split(50):
        images = drawings.images(index).to(memory_format=torch.channels_last)
        parts.append(encode(vae, images).half())
    return Latents(torch.cat(parts).contiguous(), drawings.scenes)


def drawing_code() -> int:
    """CRC of the modules and the glyphs that decide what is drawn."""
    files = [*(Path(str(module.__file__)) for module in (captions, data, draw)), draw.SHEET]
    return zlib.crc32(b"".join(file.read_bytes() for file in files))


def latents(settings: StageSettings, folders: Folders) -> Latents:
    """Training latents; encoded anew where the autoencoder or the code that draws has changed."""
    vae = load_autoencoder(folders).to(memory_format=torch.channels_last)
    weights = float(sum(value.double().abs().sum() for value in vae.encoder.state_dict().values()))
    folder = settings.work / f"latents-{weights:.3f}-{drawing_code():08x}"
    folder.mkdir(exist_ok=True)
    parts = [_part(vae, folder, seed) for seed in range(-(-settings.images // SHARD))]
    return Latents(torch.cat([part.values for part in parts]), [scene for part in parts for scene in part.scenes])


def _part(vae: Any, folder: Path, seed: int) -> Latents:
    path = folder / f"{seed}.pt"
    if not path.exists():
        part = encode_drawings(vae, SHARD, seed)
        unfinished = folder / f"{seed}-{os.getpid()}.new"  # other stages may encode the same drawings now
        try:
            torch.save([part.values, part.scenes], unfinished)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    return Latents(*torch.load(path, weights_only=False))  # our own file: scenes are dataclasses
