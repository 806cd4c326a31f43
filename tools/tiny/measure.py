"""Prompts, generated and drawn images, and the shares that the reader finds right."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from comfyui_pcpo.tiny.align import AlignImageEncoder
from comfyui_pcpo.tiny.captions import (
    COLORS,
    PATTERNS,
    RELATIONS,
    SIZES,
    Scene,
    caption,
    held_out_pairs,
    held_out_prompts,
    is_held_out,
    is_valid,
)
from comfyui_pcpo.tiny.judge import judge
from comfyui_pcpo.tiny.pipelines import MODELS, load_tiny
from comfyui_pcpo.tiny.tinyeval import known_scene, read_all
from tools.tiny.data import random_scene
from tools.tiny.draw import draw

GENERATED_AT_ONCE = 48


def suites(number: int = 144) -> dict[str, list[str]]:
    """Held-out prompts by what they ask for: equal objects, pairs, shapes, mixed counts; at most `number` of each."""
    rng = np.random.default_rng(20)
    scenes = [scene for scene in (random_scene(rng) for _ in range(20_000)) if is_held_out(scene)]
    shapes = [scene for scene in scenes if any(thing.color for thing in scene.things) and scene.total == 2]
    mixed = [scene for scene in scenes if len(scene.things) == 2 and scene.total > 2]
    found = {"equal": held_out_prompts(), "pairs": held_out_pairs(), "shapes": [], "mixed": []}
    found["shapes"] = [caption(scene) for scene in shapes]
    found["mixed"] = [caption(scene) for scene in mixed]
    return {name: prompts[:: max(1, len(prompts) // number)][:number] for name, prompts in found.items()}


def with_background(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with everything unsaid chosen at random."""
    while True:
        things = scene.things
        if scene.total == 1 and things[0].size is None:
            things = (replace(things[0], size=SIZES[rng.integers(2)]),)
        color = scene.color or list(COLORS)[rng.integers(len(COLORS))]
        full = Scene(things, scene.relation, color, scene.pattern or PATTERNS[rng.integers(3)])
        if full.relation is None and scene.total == len(things) == 2:
            full = replace(full, relation=RELATIONS[rng.integers(2)], things=things[:: int(rng.choice((1, -1)))])
        if is_valid(full):
            return full


def drawn(prompts: Sequence[str], seed: int) -> Tensor:
    """Drawn images of the prompts, -> (B, H, W, 3) in [0, 1]."""
    rng = np.random.default_rng(seed)
    images = [np.asarray(draw(with_background(known_scene(prompt), rng), rng), np.float32) / 255 for prompt in prompts]
    return torch.from_numpy(np.stack(images))


def generate(
    name: str, prompts: Sequence[str], steps: int, guidance: float, root: Path = MODELS, seed: int = 0
) -> Tensor:
    """Images of the plain diffusers pipeline, -> (B, H, W, 3) in [0, 1]."""
    pipeline = load_tiny(name, root)
    pipeline.set_progress_bar_config(disable=True)
    more = {"max_sequence_length": 0} if name == "emoji-flow" else {}
    images = []
    for start in range(0, len(prompts), GENERATED_AT_ONCE):
        generator = torch.Generator().manual_seed(seed + start)
        settings = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "np", **more}
        found = pipeline(list(prompts[start : start + GENERATED_AT_ONCE]), generator=generator, **settings)
        images.append(torch.from_numpy(found.images))
    return torch.cat(images)


@torch.no_grad()
def features(encoder: AlignImageEncoder, images: Tensor) -> Tensor:
    """emoji-align's features, (B, H, W, 3) -> (B, 128)."""
    return torch.cat([encoder.encode(x.permute(0, 3, 1, 2) * 2 - 1) for x in images.split(GENERATED_AT_ONCE)])


def verdicts(encoder: AlignImageEncoder, images: Tensor, prompts: Sequence[str]) -> list[dict[str, bool]]:
    """What each image got right of its prompt, `all` included."""
    readings = read_all(encoder, images.permute(0, 3, 1, 2) * 2 - 1)
    found = [judge(reading, known_scene(prompt)) for reading, prompt in zip(readings, prompts, strict=True)]
    return [{**each, "all": all(each.values())} for each in found]


def attribute_shares(found: list[dict[str, bool]]) -> dict[str, float]:
    """Share of right verdicts per attribute, over the images whose prompt states it."""
    right: dict[str, list[bool]] = defaultdict(list)
    for each in found:
        for name, value in each.items():
            right[name].append(value)
    return {name: sum(values) / len(values) for name, values in right.items()}
