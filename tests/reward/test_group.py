"""Rewards that score a whole group at once: which images form a group, and what they return."""

import pytest
import torch

from comfyui_pcpo.reward import CombinedReward, GroupReward, RewardError, RewardSettings
from comfyui_pcpo.reward.service.server import RewardServer, ServerOptions

torch.set_num_threads(1)


class Rank(GroupReward):
    """How many images of the group are darker; records the groups that it was given."""

    name = "rank"

    def __init__(self, settings=None):
        super().__init__(settings)
        self.seen = []

    def score_group(self, images, prompt):
        self.seen.append((prompt, len(images)))
        brightness = images.float().mean((1, 2, 3))
        return (brightness[:, None] > brightness).sum(1)


def grey(*values):
    return torch.tensor(values)[:, None, None, None].expand(-1, 4, 4, 3).clone()


BATCH = grey(0.1, 0.3, 0.2, 0.9, 0.8, 0.7)


def test_a_group_is_scored_whole_whatever_images_at_once_is():
    reward = Rank(RewardSettings(images_at_once=1))
    assert reward.score(BATCH, ["a"] * 3 + ["b"] * 3, 3).tolist() == [0, 2, 1, 2, 1, 0]
    assert reward.seen == [("a", 3), ("b", 3)]


def test_groups_of_one_prompt_stay_apart_if_their_size_is_given():
    assert Rank().score(BATCH, ["a"] * 6, 3).tolist() == [0, 2, 1, 2, 1, 0]
    assert Rank().score(BATCH, ["a"] * 6).tolist() == [0, 2, 1, 5, 4, 3]


def test_without_a_size_consecutive_images_of_one_prompt_are_a_group():
    reward = Rank()
    reward.score(BATCH, ["a", "b", "b", "b", "a", "a"])
    assert reward.seen == [("a", 1), ("b", 3), ("a", 2)]


@pytest.mark.parametrize(
    ("prompts", "size", "said"),
    [(["a"] * 6, 4, "6 images in groups of 4"), (["a", "a", "b", "b", "b", "b"], 3, "0 to 2 form a group")],
)
def test_groups_that_do_not_fit_are_refused(prompts, size, said):
    with pytest.raises(RewardError, match=said):
        Rank().score(BATCH, prompts, size)


def test_an_image_of_nan_fails_alone():
    batch = BATCH.clone()
    batch[1] = torch.nan
    assert Rank().score(batch, ["a"] * 6, 3).isnan().tolist() == [False, True, False, False, False, False]


def test_a_combination_passes_whole_prompts():
    scores = CombinedReward([Rank()], [2.0]).score(BATCH[:3], ["a"] * 3)
    assert scores.total.tolist() == [0, 4, 2]


def test_the_class_must_define_score_group():
    with pytest.raises(RewardError, match="raised NotImplementedError: GroupReward does not define score_group"):
        GroupReward().score(BATCH, ["a"] * 6)


def test_a_reward_of_groups_is_not_served():
    with pytest.raises(RewardError, match="rank compares the images of a group"):
        RewardServer(Rank(), ServerOptions(token="x" * 16))
