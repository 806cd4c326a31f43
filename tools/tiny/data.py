"""The training pictures: drawn once, kept as uint8, captioned afresh at every visit."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from comfyui_pcpo.tiny.captions import COLORS, OBJECTS, PATTERNS, SIZES, Scene, forget
from tools.tiny.draw import draw, glyphs, random_scene

UNSAID = -1


@dataclass
class Pictures:
    """Pictures uint8 (N, 3, 64, 64) with the scenes they show."""

    pixels: Tensor
    scenes: list[Scene]

    def images(self, index: Tensor) -> Tensor:
        """(K,) -> (K, 3, 64, 64) float in [-1, 1]."""
        return self.pixels[index].float().div_(127.5).sub_(1)


def draw_pictures(number: int, seed: int) -> Pictures:
    """Draw `number` random pictures whose scenes are not held out."""
    rng = np.random.default_rng(seed)
    pictures = glyphs()
    scenes = [random_scene(rng) for _ in range(number)]
    pixels = np.stack([np.asarray(draw(scene, pictures, rng)) for scene in scenes])
    return Pictures(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), scenes)


def say(scene: Scene, rng: np.random.Generator) -> Scene:
    """What a caption tells of a picture: size, colour and pattern are each left unsaid now and then."""
    size, color, pattern = rng.random(3) < (0.6, 0.8, 0.65)
    return forget(scene, bool(size), bool(color), bool(pattern))


def labels(scenes: list[Scene]) -> dict[str, Tensor]:
    """Attributes as numbers, -1 where unsaid: objects (N, 20) multi-hot, total, size, color, pattern (N,)."""
    names, colors = list(OBJECTS), list(COLORS)
    hot = torch.zeros(len(scenes), len(names))
    for row, scene in enumerate(scenes):
        hot[row, [names.index(name) for name in scene.objects]] = 1.0

    def index(values: list[str | None], table: list[str]) -> Tensor:
        return torch.tensor([UNSAID if value is None else table.index(value) for value in values])

    return {
        "objects": hot,
        "total": torch.tensor([scene.total - 1 for scene in scenes]),
        "size": index([scene.size for scene in scenes], list(SIZES)),
        "color": index([scene.color for scene in scenes], colors),
        "pattern": index([scene.pattern for scene in scenes], list(PATTERNS)),
    }


def compatible(pictures: dict[str, Tensor], said: dict[str, Tensor]) -> Tensor:
    """Which caption fits which picture, (B,) x (K,) -> (B, K) bool: everything said is true of the picture."""
    fits = (pictures["objects"][:, None] == said["objects"][None]).all(-1)
    fits &= pictures["total"][:, None] == said["total"][None]
    for key in ("size", "color", "pattern"):
        fits &= (said[key][None] == UNSAID) | (pictures[key][:, None] == said[key][None])
    return fits
