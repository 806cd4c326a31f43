"""A weighted combination of rewards."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from comfyui_pcpo.reward.base import RewardError


@dataclass(frozen=True)
class CombinedScores:
    """Each reward's own scores (K, B), and their weighted raw sum (B,) where NaN marks a failure of any of them."""

    components: Tensor
    total: Tensor


def combine(scores: Sequence[Tensor], weights: Sequence[float]) -> CombinedScores:
    """The scores of K rewards, each (B,), and their sum by weight; `advantage.combine_rewards` z-scores them first."""
    components, w = torch.stack(list(scores)), torch.tensor(weights, dtype=torch.float32)
    counted = w != 0  # weight 0: reported only, so its failures must not reach the total
    return CombinedScores(components, (w[counted, None] * components[counted]).sum(0))


def require_combinable(names: Sequence[str], weights: Sequence[float]) -> None:
    """Raise RewardError unless each reward has one weight and occurs once."""
    if not names or len(names) != len(weights):
        raise RewardError(f"Got {len(names)} rewards and {len(weights)} weights. Give one weight per reward.")
    if len(set(names)) < len(names):
        raise RewardError(f"rewards are {', '.join(names)}, but each must be unique. Add up its weights.")
