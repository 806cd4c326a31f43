"""The pack's own connection types, and the values that they carry."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from comfyui_pcpo.method.guidance import ImplicitReward
from comfyui_pcpo.method.rollout import Trajectory
from comfyui_pcpo.reward import Reward
from comfyui_pcpo.reward.combine import require_combinable

PromptsType = io.Custom("PCPO_PROMPTS")
RewardType = io.Custom("PCPO_REWARD")
RunType = io.Custom("PCPO_RUN")
TrajectoryType = io.Custom("PCPO_TRAJECTORY")
ImplicitRewardType = io.Custom("PCPO_IMPLICIT_REWARD")


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts and the negative prompt with their conditionings."""

    lines: tuple[str, ...]
    positive: tuple[Any, ...]  # one ComfyUI conditioning per line
    negative_text: str
    negative: Any


@dataclass(frozen=True)
class WeightedRewards:
    """Rewards and their weights; `standardise` z-scores each reward within its group before they are added."""

    rewards: tuple[Reward, ...]
    weights: tuple[float, ...]
    standardise: bool = True

    def __post_init__(self) -> None:
        require_combinable(self.names, self.weights)

    @property
    def names(self) -> list[str]:
        return [reward.name for reward in self.rewards]


@dataclass(frozen=True)
class RunReference:
    """A run on disk, by its folder."""

    path: Path


@dataclass(frozen=True)
class RecordedTrajectory:
    """A trajectory with the native weight (T,) and the log-probability (T, B) of each step."""

    path: Trajectory
    weights: Tensor
    log_probs: Tensor


@dataclass(frozen=True)
class AlignedModel:
    """One aligned model and its weight in the guidance."""

    model: Any  # ModelPatcher
    reward: ImplicitReward
