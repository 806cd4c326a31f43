"""emoji-align: a small image-text encoder and detector. Its cosine is a reward, its heads read images.

Text goes through the same CLIP text encoder that the generators are conditioned on.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_pcpo.tiny.captions import COLORS, KINDS, PATTERNS
from comfyui_pcpo.tiny.pipelines import MODELS

PIXELS = 128
CELL = 16  # pixels per cell of the detector's map
CELLS = PIXELS // CELL
CERTAIN = 0.4  # heat from which a peak counts as an object


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
    """Image -> embedding, and what is where; images are float (B, 3, 128, 128) in [-1, 1].

    The map has one cell per 16x16 pixels; a kind's heat is high in the cell of an object's centre (CenterNet,
    arXiv 1904.07850). At most one object's centre is in a cell: centres are 48 pixels apart or more.
    """

    def __init__(self, config: AlignConfig):
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        before = 3
        for width in config.widths:
            layers += [nn.Conv2d(before, width, 4, stride=2, padding=1), Residual(width)]
            before = width
        self.trunk = nn.Sequential(*layers, Residual(before), nn.GroupNorm(8, before), nn.GELU())
        self.heat = nn.Conv2d(before, len(KINDS), 1)
        self.width = nn.Conv2d(before, 1, 1)
        self.squeeze = nn.Conv2d(before, 32, 1)
        self.features = nn.Linear(32 * CELLS**2, config.embed)
        self.projection = nn.Linear(config.embed, config.embed, bias=False)
        self.color = nn.Linear(config.embed, len(COLORS))
        self.pattern = nn.Linear(config.embed, len(PATTERNS))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def encode(self, images: Tensor) -> Tensor:
        """Features before the heads, (B, 3, 128, 128) -> (B, 128)."""
        return self.summarize(self.trunk(images))

    def summarize(self, cells: Tensor) -> Tensor:
        """Features of a map, (B, C, 8, 8) -> (B, 128)."""
        return F.gelu(self.features(self.squeeze(cells).flatten(1)))

    def embed(self, features: Tensor) -> Tensor:
        """Unit vectors to compare with text embeddings, (B, 128) -> (B, 128)."""
        return F.normalize(self.projection(features), dim=-1)


@dataclass(frozen=True)
class Detection:
    """One object or shape found in an image."""

    kind: str
    x: float  # centre in pixels, to half a cell
    y: float
    width: float  # longer side in pixels
    heat: float  # certainty, 0 to 1


@dataclass(frozen=True)
class Reading:
    """What the reader finds in an image."""

    found: tuple[Detection, ...]  # most certain first
    color: str
    pattern: str


@torch.no_grad()
def read_images(encoder: AlignImageEncoder, images: Tensor) -> list[Reading]:
    """Objects, background colour and pattern of images in [-1, 1], (B, 3, 128, 128) -> B readings."""
    cells = encoder.trunk(images)
    heat, width = encoder.heat(cells).sigmoid(), CELL * encoder.width(cells)[:, 0].exp()
    best, kind = heat.max(1)  # one kind per cell
    peak = (best == F.max_pool2d(best[:, None], 3, stride=1, padding=1)[:, 0]) & (best > CERTAIN)
    sizes = torch.stack([width, best], 1)
    features = encoder.summarize(cells)
    colors, patterns = encoder.color(features).argmax(1).tolist(), encoder.pattern(features).argmax(1).tolist()
    readings = []
    for n in range(len(images)):
        found = [
            Detection(KINDS[int(kind[n, y, x])], (x + 0.5) * CELL, (y + 0.5) * CELL, *sizes[n, :, y, x].tolist())
            for y, x in peak[n].nonzero().tolist()
        ]
        found.sort(key=lambda detection: -detection.heat)
        readings.append(Reading(tuple(found), list(COLORS)[colors[n]], PATTERNS[patterns[n]]))
    return readings


def save_config(config: AlignConfig, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")


def load_image_encoder(folder: Path = MODELS / "emoji-align") -> AlignImageEncoder:
    """The trained image encoder in float32, in eval mode, without gradients."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = AlignImageEncoder(AlignConfig(tuple(raw["widths"]), raw["embed"]))
    state = {key: value.float() for key, value in load_file(folder / "model.safetensors").items()}
    model.load_state_dict(state, strict=True)
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # reads in a third less time
