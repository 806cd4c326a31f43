"""What the smaller commands do: sample, score, export."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors.torch import save_file

from comfyui_pcpo import plot
from comfyui_pcpo.guidance import ImplicitReward
from comfyui_pcpo.lora import Family, export_state, parse_state
from comfyui_pcpo.reward import load_reward
from comfyui_pcpo.tiny.pipelines import EMBEDDED

from .config import Config, ConfigError, build, dump, tomllib
from .policy import LoraPairs
from .run import RunFolder, load_pairs, read_lora
from .sampling import Guide, sample, sampling_policy

FORMATS = ("comfyui", "diffusers", "kohya")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def factors(config: Config, pairs: LoraPairs) -> LoraPairs:
    """A checkpoint's factors with alpha / rank folded into the second."""
    scale = (config.lora.alpha or config.lora.rank) / config.lora.rank
    return {name: (down, up * scale) for name, (down, up) in pairs.items()}


def open_source(source: str) -> tuple[Config, LoraPairs | None]:
    """A run's folder, a LoRA file of this trainer, or an embedded model -> its configuration and its LoRA."""
    path = Path(source)
    if path.is_dir():
        folder = RunFolder(path)
        config = folder.config()
        return config, factors(config, load_pairs(folder.checkpoint() / "lora.safetensors"))
    if path.suffix == ".safetensors":
        state, metadata = read_lora(path)
        if "pcpo.config" not in metadata:
            raise ConfigError(
                f"{path} does not name its model. Give a run's folder or a model, and this file as --guide."
            )
        config = build(tomllib.loads(metadata["pcpo.config"]), str(path))
        return config, named_pairs(config, state)
    if source in EMBEDDED:
        return build({"model": {"name": source}}, source), None
    raise ConfigError(f"{source} is neither a run's folder, nor a .safetensors file, nor one of {', '.join(EMBEDDED)}.")


def named_pairs(config: Config, state: dict[str, torch.Tensor]) -> LoraPairs:
    """Factors by module name; the model is asked for its names, as some layouts write dots as underscores."""
    try:
        return parse_state(state, sampling_policy(config, []).module_names())
    except ValueError as error:
        raise ConfigError(f"LoRA for {config.model.name}: {error}") from None


def parse_guide(text: str, config: Config) -> Guide:
    """`FILE=WEIGHT` -> a Guide of the same model."""
    name, equals, weight = text.rpartition("=")
    try:
        value = float(weight) if equals else float("nan")
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise ConfigError(f"--guide {text} is not LORA=WEIGHT. Write it like --guide cats.safetensors=1.2.")
    path = Path(name)
    if path.is_dir():
        _, pairs = open_source(name)
        assert pairs is not None
    else:
        pairs = named_pairs(config, read_lora(path)[0])
    return Guide(pairs, ImplicitReward(value))


def sample_pictures(
    source: str,
    prompts: list[str],
    compare: bool,
    guides: list[str],
    negative: str,
    seed: int,
    steps: int,
    cfg: float | None,
    noise_level: float,
    images: int,
    out: Path,
) -> Path:
    """Make the pictures and write them as one grid, one row per prompt (two with `compare`)."""
    config, pairs = open_source(source)
    r = config.rollout.model_copy(update={} if cfg is None else {"cfg": cfg})
    p = config.prompts.model_copy(update={"negative": negative})
    config = config.model_copy(update={"rollout": r, "prompts": p})
    composed = [parse_guide(text, config) for text in guides]
    if not guides and pairs is not None:
        composed = [Guide(pairs, ImplicitReward(1.0))]
    policy = sampling_policy(config, [guide.pairs for guide in composed])
    after = sample(policy, prompts, composed, seed, steps, noise_level, images)
    texts = [prompt for prompt in prompts for _ in range(images)]
    if compare:
        before = sample(policy, prompts, [], seed, steps, noise_level, images)
        picture = plot.before_after(before, after, texts)
    else:
        picture = plot.grid(after, texts, columns=images)
    picture.save(out)
    return out


def score_pictures(path: Path, prompt: str, rewards: list[str]) -> list[dict[str, Any]]:
    """Each picture's scores, best by the first reward first; a score that failed is NaN and comes last."""
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"{path} holds 0 pictures ({', '.join(PICTURES)}). Give a folder with some, or one picture.")
    judges = {name: load_reward(name) for name in rewards}
    rows = []
    for file in files:
        try:
            picture = Image.open(file).convert("RGB")
        except (UnidentifiedImageError, FileNotFoundError) as error:
            raise ConfigError(f"{file} is not a picture that can be read ({error}). Leave it out.") from None
        image = torch.from_numpy(np.asarray(picture, np.float32) / 255)[None]
        scores = {name: float(judge.score(image, [prompt])) for name, judge in judges.items()}
        rows.append({"file": str(file), "scores": scores})
    first = rewards[0]
    return sorted(rows, key=lambda row: -np.nan_to_num(row["scores"][first], nan=-np.inf))


def export_lora(run: Path, layout: str, checkpoint: str, out: Path | None) -> Path:
    """A checkpoint's LoRA in one of FORMATS."""
    if layout not in FORMATS:
        raise ConfigError(f"--format {layout} is not one of {', '.join(FORMATS)}.")
    folder = RunFolder(run)
    config = folder.config()
    pairs = load_pairs(folder.checkpoint(checkpoint) / "lora.safetensors")
    family = sampling_policy(config, []).family
    assert family in get_args(Family)
    alpha = config.lora.alpha or float(config.lora.rank)
    state = export_state(pairs, alpha, config.lora.rank, layout, family)
    path = out or run / f"lora-{layout}.safetensors"
    metadata = {"pcpo.config": dump(config), "format": "pt"}
    save_file({k: v.contiguous() for k, v in state.items()}, path, metadata)
    return path
