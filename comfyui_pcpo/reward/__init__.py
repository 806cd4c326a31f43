"""Rewards by name. Making one costs nothing; weights are read by `load` or by the first `score`, never downloaded."""

import difflib
from pathlib import Path

from comfyui_pcpo.reward.aesthetic import Aesthetic
from comfyui_pcpo.reward.alignment import Alignment
from comfyui_pcpo.reward.base import Reward, RewardError, RewardFile, RewardSettings, Scores
from comfyui_pcpo.reward.bertscore import BertScore
from comfyui_pcpo.reward.clipscore import ClipCosine, ClipLogits, ClipScore25, ClipScore100
from comfyui_pcpo.reward.color import Colorfulness, Redness
from comfyui_pcpo.reward.combine import CombinedReward, CombinedScores
from comfyui_pcpo.reward.hpsv2 import HPSv2, HPSv21
from comfyui_pcpo.reward.imagereward import ImageReward
from comfyui_pcpo.reward.jpeg import JpegCompressibility, JpegIncompressibility
from comfyui_pcpo.reward.ocr import Ocr
from comfyui_pcpo.reward.pickscore import PickScore
from comfyui_pcpo.reward.polish import Polish
from comfyui_pcpo.reward.service.endpoint import VlmRating, VlmYes
from comfyui_pcpo.reward.service.remote import Remote
from comfyui_pcpo.reward.user import (
    import_reward,
    installed_rewards,
    named,
    own_folder,
    own_names,
    rewards_in_folder,
)
from comfyui_pcpo.reward.weights.hub import download

CLASSES: tuple[type[Reward], ...] = (
    Alignment,
    Polish,
    HPSv2,
    HPSv21,
    PickScore,
    ImageReward,
    Aesthetic,
    ClipCosine,
    ClipScore25,
    ClipScore100,
    ClipLogits,
    Ocr,
    Colorfulness,
    Redness,
    JpegCompressibility,
    JpegIncompressibility,
    BertScore,
    VlmYes,
    VlmRating,
    Remote,
)
REWARDS: dict[str, type[Reward]] = {cls.name: cls for cls in CLASSES}


def available(user_folder: Path | None = None) -> dict[str, type[Reward]]:
    """Ours, those of installed packages, and those in the user's folder (or PCPO_REWARD_FOLDER): name -> class."""
    folder = user_folder or own_folder()
    own = rewards_in_folder(folder) if folder is not None else []
    return REWARDS | named([*installed_rewards(), *own], REWARDS)


def offered() -> list[str]:
    """The names to choose from; none of the users' code is run for it."""
    return list(dict.fromkeys([*REWARDS, *own_names()]))


def load_reward(name: str, settings: RewardSettings | None = None, user_folder: Path | None = None) -> Reward:
    """The reward called `name`, its weights not read yet."""
    classes = REWARDS if name in REWARDS else available(user_folder)
    if name not in classes:
        near = difflib.get_close_matches(name, classes, 1)
        guess = f"Did you mean {near[0]}? " if near else ""
        raise RewardError(f"{name!r} is none of {len(classes)} rewards. {guess}There are {', '.join(sorted(classes))}.")
    return classes[name](settings)


__all__ = [
    "REWARDS",
    "CombinedReward",
    "CombinedScores",
    "Reward",
    "RewardError",
    "RewardFile",
    "RewardSettings",
    "Scores",
    "available",
    "download",
    "import_reward",
    "load_reward",
    "offered",
]
