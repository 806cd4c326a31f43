"""Rewards computed by a server: HPSv3, GenEval, UnifiedReward, or a built-in reward on another GPU."""

import os
from typing import Any

import torch
from torch import Tensor

from comfyui_pcpo.reward.base import Reward, RewardError, RewardSettings
from comfyui_pcpo.reward.service.wire import Peer, ServerUnavailable, ask, encode_png


def peer_from_environment(what: str) -> Peer:
    """The server named by PCPO_<what>_URL, with the token in PCPO_<what>_TOKEN; workflows contain neither."""
    url = os.environ.get(f"PCPO_{what}_URL", "")
    if not url:
        raise RewardError(f"PCPO_{what}_URL is not set, but this reward needs a server. Set it to the server's URL.")
    return Peer(url, os.environ.get(f"PCPO_{what}_TOKEN", ""))


def decode_scores(answer: Any, count: int) -> Tensor:
    """{"rewards": [...]} -> (B,); null is a failed score. Raises ServerUnavailable for any other answer."""
    scores = answer.get("rewards") if isinstance(answer, dict) else None
    if not isinstance(scores, list) or len(scores) != count:
        raise ServerUnavailable(f"The answer does not contain {count} rewards.")
    if not all(value is None or (isinstance(value, int | float) and not isinstance(value, bool)) for value in scores):
        raise ServerUnavailable("The answer contains rewards that are not numbers.")
    return torch.tensor([float("nan") if value is None else float(value) for value in scores])


class Remote(Reward):
    """The reward of the server at PCPO_REWARD_URL, described by its /info. Samples get NaN if it is unavailable."""

    name = "remote"
    typical_range = (float("-inf"), float("inf"))

    def __init__(self, settings: RewardSettings | None = None, peer: Peer | None = None):
        super().__init__(settings)
        self.peer = peer or peer_from_environment("REWARD")

    def info(self) -> dict[str, Any]:
        """The server's description of its reward: name, needs_prompt, higher_is_better, typical_range."""
        return ask(self.peer, "/info")

    def is_healthy(self) -> bool:
        try:
            return ask(self.peer, "/health") == {"status": "ok"}
        except ServerUnavailable:
            return False

    def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        payload = {"prompts": prompts, "images": [encode_png(image) for image in images.cpu().numpy()]}
        try:
            return decode_scores(ask(self.peer, "/compute", payload), len(prompts))
        except ServerUnavailable:
            return torch.full((len(prompts),), float("nan"))
