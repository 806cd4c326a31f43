"""The training images: random scenes, drawn once and kept as uint8."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from comfyui_pcpo.tiny.captions import (
    COLORS,
    OBJECTS,
    PATTERNS,
    RELATIONS,
    SHAPE_NAMES,
    Scene,
    Thing,
    is_held_out,
    is_valid,
)
from tools.tiny.draw import Box, arrange, paint

# counts of the things in a scene, and how often each such scene is drawn
GROUPS = {(1,): 0.3, (2,): 0.08, (3,): 0.08, (4,): 0.06, (1, 1): 0.36, (2, 1): 0.06, (2, 2): 0.03, (3, 1): 0.03}


@dataclass
class Drawings:
    """Images uint8 (N, 3, 128, 128), the scenes that they show, and where everything is."""

    pixels: Tensor
    scenes: list[Scene]
    boxes: list[list[Box]]

    @property
    def every_image(self) -> Tensor:
        """(N, 3, 128, 128) float in [-1, 1]."""
        return self.images(torch.arange(len(self.scenes)))

    def images(self, index: Tensor) -> Tensor:
        """(K,) -> (K, 3, 128, 128) float in [-1, 1]."""
        return self.pixels[index].float().div_(127.5).sub_(1)


def random_thing(rng: np.random.Generator, count: int, ground: str) -> Thing:
    """An object, or two times in five a shape that stands out from the ground's colour."""
    if rng.random() < 0.6:
        return Thing(list(OBJECTS)[rng.integers(len(OBJECTS))], count)
    colors = [color for color in COLORS if color != ground]
    return Thing(list(SHAPE_NAMES)[rng.integers(len(SHAPE_NAMES))], count, None, colors[rng.integers(len(colors))])


def random_scene(rng: np.random.Generator) -> Scene:
    """A valid scene with everything said that its drawing shows, except for the relation of `and` pairs."""
    colors, groups = list(COLORS), list(GROUPS)
    while True:
        color = colors[rng.integers(len(colors))]
        pattern = PATTERNS[rng.choice(3, p=(0.5, 0.25, 0.25))]
        counts = groups[rng.choice(len(groups), p=list(GROUPS.values()))]
        things = tuple(random_thing(rng, counts[i], color) for i in rng.permutation(len(counts)))
        relation = RELATIONS[rng.integers(2)] if counts == (1, 1) else None
        if counts == (1,):
            things = (replace(things[0], size=("small", "big")[rng.integers(2)]),)
        scene = Scene(things, relation, color, pattern)
        if is_valid(scene):
            return scene


def trained(scene: Scene) -> bool:
    """Whether generators and text encoder may see the scene."""
    return not is_held_out(scene)


def draw_scenes(number: int, seed: int, allowed: Callable[[Scene], bool] = trained) -> Drawings:
    """Draw `number` random scenes that are allowed."""
    rng = np.random.default_rng(seed)
    scenes: list[Scene] = []
    while len(scenes) < number:
        scene = random_scene(rng)
        if allowed(scene):
            scenes.append(scene)
    boxes = [arrange(scene, rng) for scene in scenes]
    pixels = np.stack([np.asarray(paint(scene, found)) for scene, found in zip(scenes, boxes, strict=True)])
    return Drawings(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), scenes, boxes)
