"""Published judges behind a VLM endpoint, asked in the words that they were published with."""

import math
import re

import numpy as np

from comfyui_pcpo.reward.service.endpoint import TOP, EndpointReward, first_token

FINAL_SCORE = re.compile(r"final score[\s*_]*(?:\([^)]*\))?[\s*_]*:[\s*_]*(-?\d+(?:\.\d+)?)(?![.,]?\d)", re.IGNORECASE)
"""Such as `**Final Score (1-5):** 4.5`; not a number with a comma, which may be a decimal or a list."""


class VqaScore(EndpointReward):
    """VQAScore: P("Yes") as the first token of the answer. Unlike `vlm_yes`, it is not divided by P(yes) + P(no).

    Lin et al. 2024 (arXiv 2404.01291), equation 1
    """

    name = "vqascore"
    typical_range = (0.0, 1.0)

    def score_image(self, image: np.ndarray, prompt: str) -> tuple[float, str]:
        question = f'Does this figure show "{prompt}"? Please answer yes or no.'
        answer = self.chat(image, question, {"max_tokens": 1, "logprobs": True, "top_logprobs": TOP})
        likely = first_token(answer["logprobs"])
        known = any(token.lower() in ("yes", "no") for token, _ in likely)
        score = sum(p for token, p in likely if token == "Yes") if known else math.nan
        return self.known(score, answer["text"], "log-probabilities of yes or no")


class UnifiedReward(EndpointReward):
    """The rating from 1 to 5 by UnifiedReward, divided by 5.

    Wang et al. 2025 (arXiv 2503.05236), pointwise score of image generation
    """

    name = "unifiedreward"
    typical_range = (0.2, 1.0)

    def score_image(self, image: np.ndarray, prompt: str) -> tuple[float, str]:
        answer = self.chat(image, RATING.replace("{prompt}", prompt), {"max_tokens": 1024})
        return self.known(final_score(answer["text"], 5) / 5, answer["text"], "a final score from 1 to 5")


def final_score(text: str, most: float) -> float:
    """The number after the last "Final Score:"; NaN unless it is between 1 and `most`."""
    found = FINAL_SCORE.findall(text)
    value = float(found[-1]) if found else math.nan
    return value if 1 <= value <= most else math.nan


RATING = (
    "You are given a text caption and a generated image based on that caption. Your task is to evaluate this image "
    "based on two key criteria:\n"
    "1. Alignment with the Caption: Assess how well this image aligns with the provided caption. Consider the accuracy "
    "of depicted objects, their relationships, and attributes as described in the caption.\n"
    "2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail preservation, color "
    "accuracy, and overall aesthetic appeal.\n"
    "Based on the above criteria, assign a score from 1 to 5 after 'Final Score:'.\n"
    "Your task is provided as follows:\nText Caption: [{prompt}]"
)
"""The question that UnifiedReward was trained on."""
