"""Rewards that ask a vision-language model behind an OpenAI-compatible endpoint.

PCPO_VLM_URL (such as http://127.0.0.1:8000/v1), PCPO_VLM_MODEL and PCPO_VLM_TOKEN come from the environment only.
"""

import math
import os
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comfyui_pcpo.reward.base import Reward, RewardError, RewardSettings, Scores
from comfyui_pcpo.reward.service.remote import peer_from_environment
from comfyui_pcpo.reward.service.wire import LostServer, Peer, ask, encode_png

TOP = 20  # how many likely tokens an endpoint tells of


@dataclass(frozen=True)
class Vlm:
    """A model behind an endpoint."""

    peer: Peer
    model: str

    def chat(self, picture: np.ndarray, question: str, options: dict[str, Any]) -> dict[str, Any]:
        """The first choice of a chat completion about a picture, uint8 (H, W, 3)."""
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encode_png(picture)}"}},
            {"type": "text", "text": question},
        ]
        payload = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": content}], **options}
        answer = ask(self.peer, "/chat/completions", payload)
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise LostServer("The answer is not a chat completion.") from error
        return {"text": text if isinstance(text, str) else "", "logprobs": choice.get("logprobs")}


def vlm_from_environment() -> Vlm:
    model = os.environ.get("PCPO_VLM_MODEL", "")
    if not model:
        raise RewardError("PCPO_VLM_MODEL is not set, but endpoints serve models by name. Set it to one.")
    return Vlm(peer_from_environment("VLM"), model)


def yes_share(logprobs: Any) -> float:
    """P(yes) / (P(yes) + P(no)) of the first answered token; NaN where neither is among the likely ones."""
    try:
        likely = [(str(e["token"]), float(e["logprob"])) for e in logprobs["content"][0]["top_logprobs"]]
    except (KeyError, IndexError, TypeError, ValueError):
        return float("nan")
    yes, no = (sum(math.exp(p) for token, p in likely if token.strip().lower() == word) for word in ("yes", "no"))
    return yes / (yes + no) if yes + no > 0 else float("nan")


def first_number(text: str, most: float) -> float:
    """The first number in an answer; NaN where there is none from 0 to `most`."""
    found = re.search(r"-?\d+(?:\.\d+)?", text)
    value = float(found.group()) if found else float("nan")
    return value if 0 <= value <= most else float("nan")


class EndpointReward(Reward):
    """Asks about one picture at a time; an endpoint that is lost fails the sample."""

    def __init__(self, settings: RewardSettings | None = None, vlm: Vlm | None = None):
        super().__init__(settings)
        self.vlm = vlm or vlm_from_environment()

    def judge(self, picture: np.ndarray, prompt: str) -> tuple[float, str]:
        """Score and answer for one picture, uint8 (H, W, 3)."""
        raise NotImplementedError(f"{type(self).__name__} lacks judge. Write one that returns a score and the answer.")

    def score_batch(self, images: Tensor, prompts: list[str]) -> Scores:
        found = [self.judge_or_fail(p, t) for p, t in zip(images.cpu().numpy(), prompts, strict=True)]
        return Scores(torch.tensor([score for score, _ in found]), {"answer": [answer for _, answer in found]})

    def judge_or_fail(self, picture: np.ndarray, prompt: str) -> tuple[float, str]:
        try:
            return self.judge(picture, prompt)
        except LostServer:
            return float("nan"), ""


class VlmYes(EndpointReward):
    """How sure the model is that the picture shows the prompt.

    Lin et al. 2024, Evaluating Text-to-Visual Generation with Image-to-Text Generation, equation 1
    """

    name = "vlm_yes"
    typical_range = (0.0, 1.0)

    def judge(self, picture: np.ndarray, prompt: str) -> tuple[float, str]:
        question = f'Does this image show "{prompt}"? Answer yes or no.'
        found = self.vlm.chat(picture, question, {"max_tokens": 1, "logprobs": True, "top_logprobs": TOP})
        return yes_share(found["logprobs"]), found["text"]


class VlmRating(EndpointReward):
    """The model's rating of how well the picture shows the prompt, divided by 10."""

    name = "vlm_rating"
    typical_range = (0.0, 1.0)

    def judge(self, picture: np.ndarray, prompt: str) -> tuple[float, str]:
        question = f'Rate from 0 to 10 how well this image shows "{prompt}". Answer with the number only.'
        found = self.vlm.chat(picture, question, {"max_tokens": 8})
        return first_number(found["text"], 10) / 10, found["text"]
