"""Prompts, generated and drawn images, and the shares that the reader finds right."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from comfyui_pcpo.reward.alignment import encoder_input
from comfyui_pcpo.reward.base import eight_bit
from comfyui_pcpo.tiny.align import AlignImageEncoder
from comfyui_pcpo.tiny.captions import (
    COLORS,
    PATTERNS,
    Scene,
    caption,
    held_out_pairs,
    held_out_prompts,
    is_held_out,
    is_valid,
)
from comfyui_pcpo.tiny.judge import judge
from comfyui_pcpo.tiny.pipelines import MODELS, load_tiny
from comfyui_pcpo.tiny.tinyeval import known_scene, read_and_parse
from tools.tiny.data import random_scene
from tools.tiny.draw import draw
from trainer.config.loading import build
from trainer.evaluation.sampling import Draw, sample, sampling_policy

GENERATED_AT_ONCE = 48


def suites(number: int = 144) -> dict[str, list[str]]:
    """Held-out prompts by what they ask for: equal objects, pairs, shapes, mixed counts; at most `number` of each."""
    rng = np.random.default_rng(20)
    scenes = [scene for scene in (random_scene(rng) for _ in range(20_000)) if is_held_out(scene)]
    two = [scene for scene in scenes if len(scene.things) == 2]
    found = {
        "equal": held_out_prompts(),
        "pairs": held_out_pairs(),
        "shapes": [caption(s) for s in two if s.total == 2 and any(thing.color for thing in s.things)],
        "mixed": [caption(s) for s in two if s.total > 2],
    }
    return {name: prompts[:: max(1, len(prompts) // number)][:number] for name, prompts in found.items()}


def with_background(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with a background, of random colour and pattern where they are not said."""
    while True:
        color = scene.color or list(COLORS)[rng.integers(len(COLORS))]
        complete = replace(scene, color=color, pattern=scene.pattern or PATTERNS[rng.integers(len(PATTERNS))])
        if is_valid(complete):
            return complete


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


def generate_with_noise(name: str, prompts: Sequence[str], method: str, steps: int, root: Path = MODELS) -> Tensor:
    """Images of one of training's stochastic samplers at its published noise level, without guidance, (B, H, W, 3)."""
    rollout = {"method": method, "steps": steps, "images_at_once": GENERATED_AT_ONCE}
    tree = {"model": {"name": name}, "prompts": {"lines": list(prompts)}, "rollout": rollout}
    policy = sampling_policy(build(tree, "sampler"), [], load_tiny(name, root))
    return sample(policy, prompts, [], Draw(seed=0, steps=steps, noise_level=-1.0))


def verdicts(encoder: AlignImageEncoder, images: Tensor, prompts: Sequence[str]) -> list[dict[str, bool]]:
    """Which attributes of its prompt each image shows, `all` included."""
    found = [judge(*read) for read in read_and_parse(encoder, encoder_input(eight_bit(images)), prompts)]
    return [{**each, "all": all(each.values())} for each in found]


def attribute_shares(found: list[dict[str, bool]]) -> dict[str, float]:
    """Share of right verdicts per attribute, over the images whose prompt states it."""
    right: dict[str, list[bool]] = defaultdict(list)
    for each in found:
        for name, value in each.items():
            right[name].append(value)
    return {name: sum(values) / len(values) for name, values in right.items()}
