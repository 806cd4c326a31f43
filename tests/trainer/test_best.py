"""The best checkpoint is rated by images that its own LoRA generated, and rewards by their spread, as training does."""

import math

import pytest
import torch

from trainer.guard.limits import guard_row
from trainer.guard.probe import ImageMeasures
from trainer.runs.rows import best_update

TWO = {"colorfulness": 1.0, "jpeg_incompressibility": 1.0}


def rows(means, **more):
    return [{"update": number, "rewards": {"colorfulness": mean}, **more} for number, mean in means.items()]


def test_a_checkpoint_is_rated_by_the_updates_after_it(make_config):
    config = make_config(run={"save_every": 5})
    means = {9: 0.5, 10: 0.9, 11: 0.1, 12: 0.1, 13: 0.1, 14: 0.1, 15: 0.2, 16: 0.3}
    assert best_update(rows(means), [10, 15], config) == 15
    assert best_update(rows(means), [9, 10, 15], config) == 15


def test_up_to_five_updates_rate_a_checkpoint_but_none_beyond_the_next(make_config):
    means = {6: 0.0, 7: 0.0, 8: 1.0, 9: 1.0, 10: 1.0, 11: 0.7, 12: 0.0}  # update 5 has 0.6
    assert best_update(rows(means), [5, 10], make_config(run={"save_every": 100})) == 5
    assert best_update(rows(means), [5, 10], make_config(run={"save_every": 1})) == 10


def test_the_newest_checkpoint_is_best_only_where_no_other_is_rated(make_config):
    config = make_config()
    assert best_update(rows({1: 0.9, 2: 0.1}), [1, 2], config) == 1
    assert best_update(rows({1: 0.9, 2: 0.1}), [2], config) == 2
    assert best_update(rows({1: 0.9, 2: None, 3: 0.1}), [1, 2], config) == 2


@pytest.mark.parametrize(("standardise", "best"), [(True, 1), (False, 2)])
def test_the_reward_with_the_largest_unit_does_not_decide_alone(make_config, standardise, best):
    """Update 1 gains 1.5 deviations of colorfulness, update 2 one deviation of a reward in larger units."""
    config = make_config(reward={"weights": TWO, "standardise": standardise})
    means = [(0.2, 20.0), (0.35, 20.0), (0.2, 30.0)]
    spread = {"colorfulness": 0.1, "jpeg_incompressibility": 10.0}
    recorded = [
        {"update": n, "rewards": dict(zip(TWO, pair, strict=True)), "rewards_std": spread}
        for n, pair in enumerate(means, 1)
    ]
    assert best_update(recorded, [1, 2], config) == best


def measures(alignment: float, size: float) -> ImageMeasures:
    """Of 4 images, with deviations of 0.1 and 10."""
    odd = torch.tensor([-1.0, 1.0, -1.0, 1.0])
    scores = {"colorfulness": alignment + 0.1 * odd, "jpeg_incompressibility": size + 10 * odd}
    return ImageMeasures(scores, torch.eye(4))


def test_the_guard_sums_several_rewards_in_deviations_of_the_base_model(make_config):
    config = make_config(reward={"weights": {"colorfulness": 1.0, "jpeg_incompressibility": 2.0}}, guard={"images": 2})
    base, now = measures(0.2, 20.0), measures(0.35, 25.0)
    assert guard_row(now, base, config)["reward"] == pytest.approx(1.5 + 2 * 0.5, rel=1e-5)
    assert guard_row(base, base, config)["reward"] == pytest.approx(0, abs=1e-6)
    failed = ImageMeasures(now.scores | {"colorfulness": torch.full((4,), math.nan)}, now.features)
    assert math.isnan(guard_row(failed, base, config)["reward"])


@pytest.mark.parametrize(
    "reward",
    [
        {"weights": {"colorfulness": 1.0, "jpeg_incompressibility": 2.0}, "standardise": False},
        {"weights": {"colorfulness": 0.0, "jpeg_incompressibility": 2.0}},
        {"weights": {"colorfulness": 2.0}, "standardise": True},
    ],
)
def test_the_guard_reports_a_single_reward_or_raw_ones_in_their_unit(make_config, reward):
    config = make_config(reward=reward, guard={"images": 2})
    weights = config.reward.weights
    expected = weights["colorfulness"] * 0.35 + weights.get("jpeg_incompressibility", 0.0) * 25.0
    assert guard_row(measures(0.35, 25.0), measures(0.2, 20.0), config)["reward"] == pytest.approx(expected)
