"""Rewards from a vision-language model (VLM) behind an OpenAI-compatible endpoint.

PCPO_VLM_URL (such as http://127.0.0.1:8000/v1), PCPO_VLM_MODEL and PCPO_VLM_TOKEN are read from the environment only.
"""

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comfyui_pcpo.reward.base import Reward, RewardError, RewardSettings, Scores, blamed
from comfyui_pcpo.reward.service.images import encode_png
from comfyui_pcpo.reward.service.remote import TRIAL, peer_from_environment
from comfyui_pcpo.reward.service.wire import BadAnswer, Peer, ask

TOP = 20  # top_logprobs of a request; OpenAI's limit


@dataclass(frozen=True)
class Vlm:
    """A model behind an endpoint."""

    peer: Peer
    model: str

    def chat(
        self,
        images: Sequence[np.ndarray],
        question: str,
        options: dict[str, Any],
        tick: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """The first choice of a chat completion about images, uint8 (H, W, 3) each."""
        urls = [f"data:image/png;base64,{encode_png(image)}" for image in images]
        content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        content.append({"type": "text", "text": question})
        payload = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": content}], **options}
        answer = ask(self.peer, "/chat/completions", payload, tick)
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise BadAnswer("the answer is not a chat completion. Check the endpoint's address.") from error
        return {"text": text if isinstance(text, str) else "", "logprobs": choice.get("logprobs")}


def vlm_from_environment(settings: RewardSettings | None = None) -> Vlm:
    """The model that the environment variables name. Raises RewardError if they do not."""
    model = os.environ.get("PCPO_VLM_MODEL", "")
    if not model:
        raise RewardError("PCPO_VLM_MODEL is not set, but endpoints serve models by name. Set it to the model's name.")
    return Vlm(peer_from_environment("VLM", settings), model)


def first_token(logprobs: Any) -> list[tuple[str, float]]:
    """The likeliest first tokens, without spaces, and their probabilities; none if the answer lacks them."""
    try:
        top = logprobs["content"][0]["top_logprobs"]
        return [(str(entry["token"]).strip(), math.exp(float(entry["logprob"]))) for entry in top]
    except (KeyError, IndexError, TypeError, ValueError, OverflowError):
        return []


def first_token_share(logprobs: Any, this: str, other: str) -> float:
    """P(this) / (P(this) + P(other)) of the first generated token; NaN if neither is among the top tokens."""
    likely = first_token(logprobs)
    left, right = (sum(p for token, p in likely if token.lower() == word) for word in (this, other))
    return left / (left + right) if left + right > 0 else float("nan")


def yes_share(logprobs: Any) -> float:
    """P(yes) / (P(yes) + P(no)) of the first generated token; NaN if neither is among the top tokens."""
    return first_token_share(logprobs, "yes", "no")


def only_number(text: str, maximum: float) -> float:
    """The number in an answer such as 7, 7/10 or 7 out of 10; NaN unless there is one, between 0 and `maximum`."""
    rest = re.sub(rf"(?:/|\bout of)\s*{maximum:g}\b", " ", text)
    numbers = re.findall(r"-?\d+(?:[.,]\d+)*", rest)
    try:
        (value,) = map(float, numbers)
    except ValueError:  # several numbers, none, or one such as 7,5
        return math.nan
    return value if 0 <= value <= maximum else math.nan


class EndpointReward(Reward):
    """Scores one image per request; an image whose answer cannot be read gets NaN."""

    elsewhere = True

    def __init__(self, settings: RewardSettings | None = None, vlm: Vlm | None = None):
        super().__init__(settings)
        self.vlm = vlm or vlm_from_environment(settings)
        self.tried = False

    def load(self) -> Reward:
        """As for any reward; the endpoint is tried once, without patience, before the first image."""
        super().load()
        if not self.tried:
            impatient = Vlm(replace(self.vlm.peer, patience=0), self.vlm.model)
            with blamed(self):
                question = "Is this image grey? Answer yes or no."
                impatient.chat([TRIAL[0].numpy()], question, {"max_tokens": 1}, self.settings.tick)
            self.tried = True
        return self

    def chat(self, image: np.ndarray, question: str, options: dict[str, Any]) -> dict[str, Any]:
        """The model's answer about an image, uint8 (H, W, 3)."""
        return self.vlm.chat([image], question, options, self.settings.tick)

    def score_image(self, image: np.ndarray, prompt: str) -> tuple[float, str]:
        """Score and answer for one image, uint8 (H, W, 3)."""
        raise NotImplementedError(
            f"{type(self).__name__} does not define score_image. Define it to return a score and the answer."
        )

    def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor | Scores:
        rows = [self.score_or_nan(image, prompt) for image, prompt in zip(images.cpu().numpy(), prompts, strict=True)]
        return Scores(torch.tensor([score for score, _ in rows]), {"answer": [answer for _, answer in rows]})

    def score_or_nan(self, image: np.ndarray, prompt: str) -> tuple[float, str]:
        """`score_image`, with NaN for an answer in another format."""
        try:
            return self.score_image(image, prompt)
        except BadAnswer as error:
            self.failure = str(error)
            return float("nan"), ""

    def known(self, score: float, answer: str, wanted: str) -> tuple[float, str]:
        """Score and answer; where there is no score, the answer becomes the failure's reason."""
        if math.isnan(score):
            self.failure = f"the model answered {answer[:80]!r} without {wanted}"
        return score, answer


class VlmYes(EndpointReward):
    """Probability that the model answers yes, not no, when asked whether the image shows the prompt."""

    name = "vlm_yes"
    typical_range = (0.0, 1.0)

    def score_image(self, image: np.ndarray, prompt: str) -> tuple[float, str]:
        question = f'Does this image show "{prompt}"? Answer yes or no.'
        answer = self.chat(image, question, {"max_tokens": 1, "logprobs": True, "top_logprobs": TOP})
        return self.known(yes_share(answer["logprobs"]), answer["text"], "log-probabilities of yes or no")


class VlmRating(EndpointReward):
    """The model's rating of how well the image shows the prompt, divided by 10."""

    name = "vlm_rating"
    typical_range = (0.0, 1.0)

    def score_image(self, image: np.ndarray, prompt: str) -> tuple[float, str]:
        question = f'Rate from 0 to 10 how well this image shows "{prompt}". Answer with the number only.'
        answer = self.chat(image, question, {"max_tokens": 8})
        return self.known(only_number(answer["text"], 10) / 10, answer["text"], "a number from 0 to 10")
