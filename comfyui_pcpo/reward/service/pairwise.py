"""Preferences of a VLM between the images of a group."""

import math
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from comfyui_pcpo.reward.base import Scores
from comfyui_pcpo.reward.group import ALONE, GroupReward
from comfyui_pcpo.reward.service.endpoint import TOP, EndpointReward, first_token_share
from comfyui_pcpo.reward.service.wire import BadAnswer


class PairwiseVlm(GroupReward, EndpointReward):
    """The probability that a VLM prefers the image to another one of its group, mean over the others.

    Wang et al. 2025, Pref-GRPO (arXiv 2508.20751): the win rate within the group as the reward. Here each pair is shown
    in both orders, so that a preference for the first image cancels:  p(i > j) = (P(1 | i, j) + P(2 | j, i)) / 2
    """

    name = "pairwise_vlm"
    typical_range = (0.0, 1.0)

    def score_group(self, images: Tensor, prompt: str) -> Scores:
        """Win rates, uint8 (G, H, W, 3) -> (G,); pairs without an answer are left out."""
        if len(images) == 1:
            self.failure = ALONE
        arrays, wins = images.cpu().numpy(), torch.full((len(images), len(images)), math.nan, dtype=torch.float64)
        for i, j in combinations(range(len(arrays)), 2):
            wins[i, j] = (self.first(arrays[i], arrays[j], prompt) + 1 - self.first(arrays[j], arrays[i], prompt)) / 2
            wins[j, i] = 1 - wins[i, j]
        compared = (~wins.isnan()).sum(1)
        return Scores(wins.nanmean(1), {"compared": [str(count) for count in compared.tolist()]})

    def first(self, left: np.ndarray, right: np.ndarray, prompt: str) -> float:
        """P(the first image is preferred); NaN where the answer shows no preference."""
        question = f'Which image is the better picture of "{prompt}", the first or the second? Answer 1 or 2 only.'
        options = {"max_tokens": 1, "logprobs": True, "top_logprobs": TOP}
        try:
            answer = self.vlm.chat([left, right], question, options, self.settings.tick)
        except BadAnswer as error:
            self.failure = str(error)
            return math.nan
        return self.known(
            first_token_share(answer["logprobs"], "1", "2"), answer["text"], "log-probabilities of 1 or 2"
        )[0]
