"""emoji-align: a small image-text encoder. Its cosine is a reward, its heads read a picture, its features measure.

Text goes through the same CLIP text encoder that the generators are conditioned on.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_pcpo.tiny.captions import COLORS, OBJECTS, PATTERNS

PIXELS = 64


@dataclass(frozen=True)
class AlignConfig:
    """Widths of the image encoder; `embed` is the size of the text encoder's projection."""

    widths: tuple[int, int, int, int] = (24, 48, 96, 128)
    embed: int = 128


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(F.gelu(self.conv(self.norm(x))))


class AlignImageEncoder(nn.Module):
    """Picture -> embedding and readings; pictures are float (B, 3, 64, 64) in [-1, 1]."""

    def __init__(self, config: AlignConfig):
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        before = 3
        for width in config.widths:
            layers += [nn.Conv2d(before, width, 4, stride=2, padding=1), Residual(width)]
            before = width
        self.trunk = nn.Sequential(*layers, nn.GroupNorm(8, before), nn.GELU())
        self.features = nn.Linear(before * (PIXELS // 16) ** 2, config.embed)
        self.projection = nn.Linear(config.embed, config.embed, bias=False)
        self.objects = nn.Linear(config.embed, len(OBJECTS))
        self.total = nn.Linear(config.embed, 3)
        self.color = nn.Linear(config.embed, len(COLORS))
        self.pattern = nn.Linear(config.embed, len(PATTERNS))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def encode(self, images: Tensor) -> Tensor:
        """Features before the heads, (B, 3, 64, 64) -> (B, 128)."""
        return F.gelu(self.features(self.trunk(images).flatten(1)))

    def embed(self, features: Tensor) -> Tensor:
        """Unit vectors to compare with text embeddings, (B, 128) -> (B, 128)."""
        return F.normalize(self.projection(features), dim=-1)

    def read(self, features: Tensor) -> dict[str, Tensor]:
        """Logits of what the picture shows: objects (B, 20), total (B, 3), color (B, 8), pattern (B, 3)."""
        return {name: getattr(self, name)(features) for name in ("objects", "total", "color", "pattern")}


def save_config(config: AlignConfig, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")


def load_image_encoder(folder: Path) -> AlignImageEncoder:
    """The trained image encoder in float32, in eval mode, without gradients."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = AlignImageEncoder(AlignConfig(tuple(raw["widths"]), raw["embed"]))
    state = {key: value.float() for key, value in load_file(folder / "model.safetensors").items()}
    model.load_state_dict(state, strict=True)
    return model.eval().requires_grad_(False)
