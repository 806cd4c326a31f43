"""A weighted combination of rewards."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from comfyui_pcpo.reward.base import Reward, RewardError


@dataclass(frozen=True)
class CombinedScores:
    """Each reward's own scores (K, B), and their weighted raw sum (B,) where NaN marks a failure of any of them."""

    components: Tensor
    total: Tensor


class CombinedReward:
    """K rewards with weights (K,). `advantage.combine_rewards` z-scores the components; `total` is the plain sum."""

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float]):
        if not rewards or len(rewards) != len(weights):
            raise RewardError(f"Got {len(rewards)} rewards and {len(weights)} weights. Give one weight per reward.")
        self.rewards = list(rewards)
        self.names = [reward.name for reward in rewards]
        if len(set(self.names)) < len(self.names):
            raise RewardError(f"rewards are {', '.join(self.names)}, but each must be unique. Add up its weights.")
        self.weights = torch.tensor(weights, dtype=torch.float32)

    @property
    def needs_prompt(self) -> bool:
        return any(reward.needs_prompt for reward in self.rewards)

    def score(self, images: Tensor, prompts: list[str]) -> CombinedScores:
        """All rewards' scores, float (B, H, W, C) -> components (K, B) and total (B,)."""
        return self.combine([reward.score(images, prompts) for reward in self.rewards])

    def combine(self, scores: Sequence[Tensor]) -> CombinedScores:
        """The same from each reward's scores, K of (B,)."""
        components = torch.stack(list(scores))
        counted = self.weights != 0  # weight 0: reported only, so its failures must not reach the total
        return CombinedScores(components, (self.weights[counted, None] * components[counted]).sum(0))

    def load(self) -> "CombinedReward":
        for reward in self.rewards:
            reward.load()
        return self

    def unload(self) -> None:
        for reward in self.rewards:
            reward.unload()

    def to(self, device: str | torch.device) -> "CombinedReward":
        for reward in self.rewards:
            reward.to(device)
        return self
