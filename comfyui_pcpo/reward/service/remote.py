"""Rewards computed by a server: GenEval, a reward of your own, or a built-in reward on another GPU."""

import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from comfyui_pcpo.prompt import Prompt, metadata_of
from comfyui_pcpo.reward.base import Reward, RewardError, RewardSettings
from comfyui_pcpo.reward.service.images import encode_png
from comfyui_pcpo.reward.service.wire import BadAnswer, Peer, ServerUnavailable, ask

TRIAL = torch.full((1, 64, 64, 3), 128, dtype=torch.uint8)
"""The image of the request that tries a server before the first rollout."""


def peer_from_environment(what: str, settings: RewardSettings | None = None) -> Peer:
    """The server named by PCPO_<what>_URL, with the token in PCPO_<what>_TOKEN; workflows contain neither."""
    url = os.environ.get(f"PCPO_{what}_URL", "")
    if not url:
        raise RewardError(f"PCPO_{what}_URL is not set, but this reward needs a server. Set it to the server's URL.")
    try:
        return Peer(url, os.environ.get(f"PCPO_{what}_TOKEN", ""), patience=(settings or RewardSettings()).patience)
    except RewardError as error:
        raise RewardError(f"PCPO_{what}_URL or PCPO_{what}_TOKEN: {error}") from None


def decode_scores(answer: Any, count: int) -> Tensor:
    """{"rewards": [...]} -> (B,); null is a failed score. Raises BadAnswer for any other answer."""
    scores = answer.get("rewards") if isinstance(answer, dict) else None
    if not isinstance(scores, list) or len(scores) != count:
        given = f"{len(scores)} rewards" if isinstance(scores, list) else "no list of rewards"
        raise BadAnswer(f"the server answered with {given} for {count} images. It must send one number or null each.")
    if not all(value is None or (isinstance(value, int | float) and not isinstance(value, bool)) for value in scores):
        raise BadAnswer("the server answered with rewards that are not numbers. It must send a number or null each.")
    try:
        return torch.tensor([float("nan") if value is None else float(value) for value in scores])
    except OverflowError:
        raise BadAnswer("the server answered with a reward too large for a number of 64 bits.") from None


class Remote(Reward):
    """The reward of the server at PCPO_REWARD_URL, described by its /info."""

    name = "remote"
    typical_range = (float("-inf"), float("inf"))
    elsewhere = True

    def __init__(self, settings: RewardSettings | None = None, peer: Peer | None = None):
        super().__init__(settings)
        self.peer = peer or peer_from_environment("REWARD", settings)
        self.tried = False

    def info(self) -> dict[str, Any]:
        """The server's description of its reward: name, needs_prompt, typical_range."""
        return ask(self.peer, "/info", tick=self.settings.tick)

    def is_healthy(self) -> bool:
        try:
            return ask(replace(self.peer, patience=0), "/health") == {"status": "ok"}
        except (ServerUnavailable, BadAnswer):
            return False

    def require_prompts(self, prompts: list[str]) -> None:
        """Try the server once, with the first prompt, so that a wrong address or token is reported before any work."""
        if prompts and not self.tried:
            self.request(TRIAL, [Prompt(self.settings.plain(prompts[0]), metadata_of(prompts[0]))])

    def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.request(images, prompts)

    def request(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The server's scores of images, uint8 (B, H, W, 3) -> (B,); the first request is made without patience."""
        peer = self.peer if self.tried else replace(self.peer, patience=0)
        payload: dict[str, Any] = {"prompts": prompts, "images": [encode_png(image) for image in images.cpu().numpy()]}
        metadata = [metadata_of(prompt) for prompt in prompts]
        if any(metadata):
            payload["metadata"] = metadata
        scores = decode_scores(ask(peer, "/compute", payload, self.settings.tick), len(prompts))
        self.tried = True
        if scores.isnan().any():
            self.failure = f"{peer.url} sent null"
        return scores
