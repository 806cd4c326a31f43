"""Rewards by name. A new reward is one file in this folder and one line in CLASSES.

Constructing a reward is cheap: weights are read by `load` or by the first `score`, and never downloaded."""

import difflib
from pathlib import Path

from comfyui_pcpo.prompt import Prompt, metadata_of
from comfyui_pcpo.reward.base import Reward, RewardError, RewardFile, RewardSettings, Scores
from comfyui_pcpo.reward.group import GroupReward
from comfyui_pcpo.reward.user import (
    classes_by_name,
    construct,
    import_reward,
    installed_rewards,
    rewards_in_folder,
    user_reward_folder,
    user_reward_names,
)
from comfyui_pcpo.reward.weights.hub import download

CLASSES: dict[str, str] = {  # name -> module of this package and class
    "alignment": "alignment:Alignment",
    "polish": "polish:Polish",
    "tinyeval": "tinyeval:TinyEval",
    "hpsv2": "hpsv2:HPSv2",
    "hpsv2.1": "hpsv2:HPSv21",
    "hpsv3": "hpsv3:HPSv3",
    "pickscore": "pickscore:PickScore",
    "imagereward": "imagereward:ImageReward",
    "aesthetic": "aesthetic:Aesthetic",
    "clip_cosine": "clipscore:ClipCosine",
    "clipscore_2.5": "clipscore:ClipScore25",
    "clipscore_100": "clipscore:ClipScore100",
    "clip_logits": "clipscore:ClipLogits",
    "ocr": "ocr:Ocr",
    "colorfulness": "color:Colorfulness",
    "redness": "color:Redness",
    "jpeg_compressibility": "jpeg:JpegCompressibility",
    "jpeg_incompressibility": "jpeg:JpegIncompressibility",
    "bertscore": "bertscore:BertScore",
    "vlm_yes": "service.endpoint:VlmYes",
    "vlm_rating": "service.endpoint:VlmRating",
    "vqascore": "service.judges:VqaScore",
    "unifiedreward": "service.judges:UnifiedReward",
    "pairwise_vlm": "service.pairwise:PairwiseVlm",
    "diversity": "diversity:Diversity",
    "tiny_diversity": "diversity:TinyDiversity",
    "remote": "service.remote:Remote",
}
REWARDS: dict[str, type[Reward]] = {name: import_reward(f"{__name__}.{spec}") for name, spec in CLASSES.items()}


def available(user_folder: Path | None = None) -> dict[str, type[Reward]]:
    """Built-in rewards, those of installed packages, and those in the user's folder (or PCPO_REWARD_FOLDER)."""
    folder = user_folder or user_reward_folder()
    own = rewards_in_folder(folder) if folder is not None else []
    return REWARDS | classes_by_name([*installed_rewards(), *own], REWARDS)


def offered() -> list[str]:
    """All reward names, found without running any user code."""
    return list(dict.fromkeys([*REWARDS, *user_reward_names()]))


def load_reward(name: str, settings: RewardSettings | None = None, user_folder: Path | None = None) -> Reward:
    """The reward called `name`, with its weights not yet loaded."""
    classes = REWARDS if name in REWARDS else available(user_folder)
    if name not in classes:
        near = difflib.get_close_matches(name, classes, 1)
        guess = f"Did you mean {near[0]}? " if near else ""
        raise RewardError(f"{name[:80]!r} is not a known reward. {guess}Use one of {', '.join(sorted(classes))}.")
    return construct(classes[name], settings)


__all__ = [
    "REWARDS",
    "GroupReward",
    "Prompt",
    "Reward",
    "RewardError",
    "RewardFile",
    "RewardSettings",
    "Scores",
    "available",
    "construct",
    "download",
    "import_reward",
    "load_reward",
    "metadata_of",
    "offered",
]
