"""What travels along our own wires."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from comfyui_pcpo.method.guidance import ImplicitReward
from comfyui_pcpo.method.rollout import Trajectory
from comfyui_pcpo.reward import CombinedReward, Reward

PromptsType = io.Custom("PCPO_PROMPTS")
RewardType = io.Custom("PCPO_REWARD")
RunType = io.Custom("PCPO_RUN")
TrajectoryType = io.Custom("PCPO_TRAJECTORY")
ImplicitRewardType = io.Custom("PCPO_IMPLICIT_REWARD")


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts with their conditionings, and the negative prompt's."""

    lines: tuple[str, ...]
    positive: tuple[Any, ...]  # one ComfyUI conditioning per line
    negative_text: str
    negative: Any


@dataclass(frozen=True)
class RewardSum:
    """Rewards with their weights; `standardise` puts them on one scale within a group before they are added."""

    rewards: tuple[Reward, ...]
    weights: tuple[float, ...]
    standardise: bool = True

    def combined(self) -> CombinedReward:
        return CombinedReward(self.rewards, self.weights)


@dataclass(frozen=True)
class Run:
    """A run folder."""

    path: Path


@dataclass(frozen=True)
class RecordedTrajectory:
    """A trajectory with the native weight (T,) and the log-probability (T, B) of every step."""

    path: Trajectory
    weights: Tensor
    log_probs: Tensor


@dataclass(frozen=True)
class Aligned:
    """One aligned model and its share of the guidance."""

    model: Any  # ModelPatcher
    reward: ImplicitReward
