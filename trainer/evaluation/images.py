"""What the commands `sample` and `score` do with images: a grid from a model and its LoRAs, and scores of files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from comfyui_pcpo.method.guidance import ImplicitReward
from comfyui_pcpo.plotting.grids import before_after, grid
from comfyui_pcpo.reward import GroupReward, RewardSettings

from ..config.loading import with_options
from ..config.schema import ConfigError
from ..loop.scoring import RunError
from ..policy.diffusers_policy import module_names
from ..policy.families import denoiser_of
from ..policy.loading import load_configured
from ..runs.rewards import make_reward
from .image_files import IMAGE_SUFFIXES, images_in, read_image
from .options import SamplingOptions
from .sampling import Draw, Guide, sample, sampling_policy, untrained_seed
from .source import open_source, parse_guide, read_pairs


def sample_images(source: str, options: SamplingOptions) -> Image.Image:
    """One grid of images, a row per prompt (two with `compare`)."""
    opened, prompts = open_source(source), options.prompt
    changes = {"rollout": {"cfg": options.cfg}, "prompts": {"negative": options.negative}}
    config = with_options(opened.config, changes)
    weights = [parse_guide(text) for text in options.guide or ()] or ([(opened.path, 1.0)] if opened.path else [])
    pipeline = load_configured(config.model)
    names = module_names(denoiser_of(pipeline))
    guides = [Guide(read_pairs(path, names), ImplicitReward(weight)) for path, weight in weights]
    policy = sampling_policy(config, [guide.pairs for guide in guides], pipeline)
    draw = Draw(untrained_seed(options.seed), options.steps, options.noise_level, options.images)
    after = sample(policy, prompts, guides, draw)
    texts = [prompt for prompt in prompts for _ in range(draw.each)]
    if not options.compare:
        return grid(after, texts, columns=draw.each)
    return before_after(sample(policy, prompts, [], draw), after, texts)


def group_scores(rewards: Mapping[str, GroupReward], images: Sequence[Tensor], prompt: str) -> dict[str, Tensor]:
    """Scores (N,) of N images, (1, H, W, 3) each, that are compared with each other."""
    names = " and ".join(rewards)
    if any(image.shape != images[0].shape for image in images):
        raise ConfigError(f"The images differ in size, but {names} compares them. Give images of one size.")
    return {name: reward.score(torch.cat(list(images)), [prompt] * len(images)) for name, reward in rewards.items()}


def score_images(path: Path, prompt: str, rewards: list[str], settings: RewardSettings) -> list[dict[str, Any]]:
    """The scores of each image, best by the first reward first; a failed score is NaN and comes last."""
    files = images_in(path) if path.is_dir() else [path]
    if not files:
        raise ConfigError(
            f"{path} contains no images ({', '.join(IMAGE_SUFFIXES)}). Give an image or a folder of them."
        )
    models = {name: make_reward(name, settings) for name in rewards}
    grouped = {name: reward for name, reward in models.items() if isinstance(reward, GroupReward)}
    images, group = map(read_image, files), {}
    if grouped:
        if len(files) < 2:
            names = " and ".join(grouped)
            raise ConfigError(f"{names} compares the images of a prompt, and {files[0]} is one. Give a folder of them.")
        images = list(images)  # at once, where each is compared with all
        group = group_scores(grouped, images, prompt)
    rows = []
    for place, (file, image) in enumerate(zip(files, images, strict=True)):
        alone = {name: float(reward.score(image, [prompt])) for name, reward in models.items() if name not in group}
        together = {name: float(values[place]) for name, values in group.items()}
        rows.append({"file": str(file), "scores": {name: (alone | together)[name] for name in rewards}})
    for name, reward in models.items():
        if not any(np.isfinite(row["scores"][name]) for row in rows):
            raise RunError(f"every score of {name} failed ({reward.failure_reason}). Fix the reward or the prompt.")
    first = rewards[0]
    return sorted(rows, key=lambda row: -np.nan_to_num(row["scores"][first], nan=-np.inf))
