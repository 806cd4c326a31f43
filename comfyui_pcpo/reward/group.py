"""Rewards that compare the images of one prompt with each other, such as rankings, preferences and diversity."""

from collections.abc import Iterator
from itertools import groupby

from torch import Tensor

from comfyui_pcpo.reward.base import Reward, RewardError, Scores

ALONE = "a single image of a prompt has none to compare with; generate two or more"
"""Why a group of one image has no score."""


class GroupReward(Reward):
    """Base class of rewards that score a whole group at once. Subclasses define `score_group`.

    Scores are compared within a group only, so their mean over groups may be constant, as that of a win rate is.
    """

    def score_group(self, images: Tensor, prompt: str) -> Tensor | Scores:
        """Scores of the 8-bit images of one prompt, uint8 (G, H, W, 3) -> (G,)."""
        raise NotImplementedError(
            f"{type(self).__name__} does not define score_group. Define it to return one score per image of the group."
        )

    def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor | Scores:
        return self.score_group(images, prompts[0])

    def parts(self, prompts: list[str], group_size: int | None) -> Iterator[slice]:
        """One group each; without `group_size`, consecutive images with the same prompt are a group."""
        sizes = [len(list(same)) for _, same in groupby(prompts)]
        if group_size is not None:
            if group_size < 1 or len(prompts) % group_size:
                raise RewardError(
                    f"Got {len(prompts)} images in groups of {group_size}. Give a group_size that divides their number."
                )
            sizes = [group_size] * (len(prompts) // group_size)
        start = 0
        for size in sizes:
            part = slice(start, start + size)
            if len(set(prompts[part])) > 1:
                raise RewardError(
                    f"The images {start} to {start + size - 1} form a group but have different prompts. Pass group "
                    "after group, with the images of one prompt in each."
                )
            yield part
            start += size
