"""What the commands `sample` and `score` do with images: a grid from a model and its LoRAs, and scores of files."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from comfyui_pcpo.method.guidance import ImplicitReward
from comfyui_pcpo.method.rollout import derive_seed
from comfyui_pcpo.plotting.grids import before_after, grid
from comfyui_pcpo.reward import RewardSettings

from ..config.loading import with_options
from ..config.schema import ConfigError
from ..loop.scoring import RunError
from ..policy.diffusers_policy import module_names
from ..policy.families import denoiser_of
from ..policy.loading import load_configured
from ..runs.rewards import make_reward
from .image_files import IMAGE_SUFFIXES, images_in, read_image
from .options import SamplingOptions
from .sampling import Draw, Guide, sample, sampling_policy
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
    # noise that no update was trained on, even if both seeds are 0
    draw = Draw(derive_seed(options.seed, 0, 0, 2), options.steps, options.noise_level, options.images)
    after = sample(policy, prompts, guides, draw)
    texts = [prompt for prompt in prompts for _ in range(draw.each)]
    if not options.compare:
        return grid(after, texts, columns=draw.each)
    return before_after(sample(policy, prompts, [], draw), after, texts)


def score_images(path: Path, prompt: str, rewards: list[str], settings: RewardSettings) -> list[dict[str, Any]]:
    """The scores of each image, best by the first reward first; a failed score is NaN and comes last."""
    files = images_in(path) if path.is_dir() else [path]
    if not files:
        raise ConfigError(
            f"{path} contains no images ({', '.join(IMAGE_SUFFIXES)}). Give an image or a folder of them."
        )
    models = {name: make_reward(name, settings) for name in rewards}
    rows = []
    for file in files:
        image = read_image(file)
        scores = {name: float(reward.score(image, [prompt])) for name, reward in models.items()}
        rows.append({"file": str(file), "scores": scores})
    for name, reward in models.items():
        if not any(np.isfinite(row["scores"][name]) for row in rows):
            raise RunError(
                f"every score of {name} failed ({reward.failure or 'NaN or infinite'}). Fix the reward or the prompt."
            )
    first = rewards[0]
    return sorted(rows, key=lambda row: -np.nan_to_num(row["scores"][first], nan=-np.inf))
