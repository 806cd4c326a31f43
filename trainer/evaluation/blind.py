"""Blind comparison of two sides, each a folder of images or a model that is sampled from the same noise."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comfyui_pcpo.method.guidance import ImplicitReward
from comfyui_pcpo.taste.blind import BlindPair, blind_pairs, vote_on, win_rate
from comfyui_pcpo.taste.human import Ask

from ..config.errors import ConfigError
from ..policy.diffusers_policy import module_names
from ..policy.families import denoiser_of
from ..policy.loading import load_configured
from .image_files import images_in, read_image
from .sampling import Draw, Guide, sample, sampling_policy
from .source import open_source, read_pairs


@dataclass(frozen=True)
class BlindTest:
    """What is compared, and how: prompts for sides that are sampled, and the number of pairs (0 = all)."""

    prompts: Sequence[str]
    draw: Draw
    question: str
    pairs: int
    seed: int


def is_image_folder(path: Path) -> bool:
    """Whether a folder is a side of images; a run, which holds some too, and a model are sampled."""
    sampled = any((path / file).is_file() for file in ("config.toml", "model_index.json"))
    return path.is_dir() and not sampled and bool(images_in(path))


def side_images(side: str, test: BlindTest) -> Tensor:
    """The images of a side, (N, H, W, 3): of a folder in the order of their names, or sampled."""
    if is_image_folder(Path(side)):
        images = [read_image(file) for file in images_in(Path(side))]
        if any(image.shape != images[0].shape for image in images):
            raise ConfigError(f"The images in {side} differ in size, but are shown in pairs. Give images of one size.")
        return torch.cat(images)
    if not test.prompts:
        raise ConfigError(f"{side} is no folder of images, so it is sampled, but there are no prompts. Give --prompt.")
    opened = open_source(side)
    pipeline = load_configured(opened.config.model)
    pairs = [] if opened.path is None else [read_pairs(opened.path, module_names(denoiser_of(pipeline)))]
    policy = sampling_policy(opened.config, pairs, pipeline)
    return sample(policy, list(test.prompts), [Guide(pair, ImplicitReward(1.0)) for pair in pairs], test.draw)


def pairs_of_sides(a: str, b: str, test: BlindTest) -> list[BlindPair]:
    """The pairs to ask about. Raises ConfigError where there are fewer than the test wants."""
    pairs = blind_pairs(side_images(a, test), side_images(b, test), test.pairs, test.seed)
    if len(pairs) < test.pairs:
        raise ConfigError(f"--pairs is {test.pairs}, but there are {len(pairs)} pairs. Give at most that many.")
    return pairs


def compare_blind(
    pairs: Sequence[BlindPair], question: str, ask: Ask, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Ask about each pair; the win rate of the second side, with every vote.

    `keep` is given the result so far after every vote, so that an interrupt loses none.
    """
    return result_of(pairs, vote_on(pairs, question, ask, lambda wins: keep(result_of(pairs, wins))))


def result_of(pairs: Sequence[BlindPair], wins: Sequence[float]) -> dict[str, Any]:
    votes = [{"pair": pair.row, "b_wins": win} for pair, win in zip(pairs, wins, strict=False)]
    return {**(asdict(win_rate(wins)) if wins else {}), "pairs": votes}
