"""Rewards that another process or machine computes: HPSv3, GenEval, UnifiedReward, or any of ours on another GPU."""

import os
from typing import Any

import torch
from torch import Tensor

from comfyui_pcpo.reward.base import Reward, RewardError, RewardSettings
from comfyui_pcpo.reward.service.wire import LostServer, Peer, ask, encode_png


def peer_from_environment(what: str) -> Peer:
    """The server named by PCPO_<what>_URL, with the token in PCPO_<what>_TOKEN: workflows never carry either."""
    url = os.environ.get(f"PCPO_{what}_URL", "")
    if not url:
        raise RewardError(f"PCPO_{what}_URL is not set, but this reward asks a server. Set it to the server's address.")
    return Peer(url, os.environ.get(f"PCPO_{what}_TOKEN", ""))


def read_rewards(answer: Any, count: int) -> Tensor:
    """{"rewards": [...]} -> (B,); null is a failed score. Any other answer counts as no answer."""
    found = answer.get("rewards") if isinstance(answer, dict) else None
    if not isinstance(found, list) or len(found) != count:
        raise LostServer(f"The answer does not hold {count} rewards.")
    if not all(value is None or (isinstance(value, int | float) and not isinstance(value, bool)) for value in found):
        raise LostServer("The answer holds rewards that are not numbers.")
    return torch.tensor([float("nan") if value is None else float(value) for value in found])


class Remote(Reward):
    """Whatever the server at PCPO_REWARD_URL computes; its /info says what. A lost server fails the samples."""

    name = "remote"
    typical_range = (float("-inf"), float("inf"))

    def __init__(self, settings: RewardSettings | None = None, peer: Peer | None = None):
        super().__init__(settings)
        self.peer = peer or peer_from_environment("REWARD")

    def info(self) -> dict[str, Any]:
        """What the server says of its reward: name, needs_prompt, higher_is_better, typical_range."""
        return ask(self.peer, "/info")

    def is_healthy(self) -> bool:
        try:
            return ask(self.peer, "/health") == {"status": "ok"}
        except LostServer:
            return False

    def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        payload = {"prompts": prompts, "images": [encode_png(picture) for picture in images.cpu().numpy()]}
        try:
            return read_rewards(ask(self.peer, "/compute", payload), len(prompts))
        except LostServer:
            return torch.full((len(prompts),), float("nan"))
