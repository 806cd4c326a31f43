"""What the smaller commands do: sample, score, export."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import save_file

from comfyui_pcpo.lora.families import detect_family
from comfyui_pcpo.lora.formats import export_state
from comfyui_pcpo.method.guidance import ImplicitReward
from comfyui_pcpo.method.rollout import derive_seed
from comfyui_pcpo.plotting.grids import before_after, grid
from comfyui_pcpo.reward import RewardSettings

from ..config.loading import dump
from ..config.schema import ConfigError
from ..evaluation.metrics import IMAGE_SUFFIXES, images_in, read_image
from ..evaluation.sampling import Draw, Guide, sample, sampling_policy
from ..evaluation.source import open_source, parse_guide, read_pairs
from ..policy.diffusers_policy import module_names
from ..policy.families import denoiser_of
from ..policy.loading import load_pipeline
from ..policy.lora_pairs import read_lora
from ..runs.folder import RunFolder
from ..runs.rewards import make_reward

FORMATS = ("comfyui", "diffusers", "kohya")


@dataclass(frozen=True)
class SampleRequest:
    """What `sample` is to show; None is the run's own value."""

    prompts: list[str]
    guides: list[str]  # LORA=WEIGHT; the source's own LoRA if empty
    compare: bool = False  # beside the same noise without LoRA
    negative: str | None = None
    cfg: float | None = None


def sample_images(source: str, wish: SampleRequest, draw: Draw) -> Image.Image:
    """One grid of pictures, one row per prompt (two with `compare`)."""
    given, prompts = open_source(source), wish.prompts
    config = given.config
    r = config.rollout.model_copy(update={} if wish.cfg is None else {"cfg": wish.cfg})
    p = config.prompts.model_copy(update={} if wish.negative is None else {"negative": wish.negative})
    config = config.model_copy(update={"rollout": r, "prompts": p})
    wanted = [parse_guide(text) for text in wish.guides] or ([(given.path, 1.0)] if given.path else [])
    pipeline = load_pipeline(config.model.name, config.model.config)
    names = module_names(denoiser_of(pipeline))
    composed = [Guide(read_pairs(path, names), ImplicitReward(weight)) for path, weight in wanted]
    policy = sampling_policy(config, [guide.pairs for guide in composed], pipeline)
    # other noise than any update's, though both seeds may be 0
    draw = replace(draw, seed=derive_seed(draw.seed, 0, 0, 2))
    after = sample(policy, prompts, composed, draw)
    texts = [prompt for prompt in prompts for _ in range(draw.each)]
    if not wish.compare:
        return grid(after, texts, columns=draw.each)
    return before_after(sample(policy, prompts, [], draw), after, texts)


def score_images(path: Path, prompt: str, rewards: list[str], settings: RewardSettings) -> list[dict[str, Any]]:
    """Each picture's scores, best by the first reward first; a score that failed is NaN and comes last."""
    files = images_in(path) if path.is_dir() else [path]
    if not files:
        raise ConfigError(
            f"{path} holds no images ({', '.join(IMAGE_SUFFIXES)}). Give a folder of images, or one image."
        )
    judges = {name: make_reward(name, settings) for name in rewards}
    rows = []
    for file in files:
        image = read_image(file)
        scores = {name: float(judge.score(image, [prompt])) for name, judge in judges.items()}
        rows.append({"file": str(file), "scores": scores})
    first = rewards[0]
    return sorted(rows, key=lambda row: -np.nan_to_num(row["scores"][first], nan=-np.inf))


def export_lora(run: Path, layout: str, checkpoint: str, out: Path | None) -> Path:
    """A checkpoint's LoRA in one of FORMATS."""
    if layout not in FORMATS:
        raise ConfigError(f"--format {layout} is not one of {', '.join(FORMATS)}.")
    folder = RunFolder(run)
    config, pairs = folder.config(), folder.lora(checkpoint)
    family: Any = read_lora(folder.lora_file)[1].get("pcpo.family") or detect_family(pairs)
    state = export_state(pairs, config.lora.rank, config.lora.rank, layout, family)
    path = out or run / f"lora-{layout}.safetensors"
    metadata = {"pcpo.config": dump(config), "format": "pt"}
    save_file({k: v.contiguous() for k, v in state.items()}, path, metadata)
    return path
