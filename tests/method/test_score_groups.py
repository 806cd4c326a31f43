"""From scores to advantages: one reward enters as it is, several share the advantage's own population."""

import numpy as np
import pytest
import torch

from comfyui_pcpo.method.advantage import (
    AdvantageRule,
    PromptWindow,
    clip_advantage,
    combine_rewards,
    group_advantage,
    score_groups,
)

NAN = float("nan")
PROMPTS = ["a", "b"]


def scored(scores, weights, rule=None, window=None, prompts=PROMPTS):
    scores = torch.as_tensor(np.asarray(scores, dtype=np.float64))
    return score_groups(scores, weights, rule or AdvantageRule(), prompts, window or PromptWindow())


def uneven():
    """Rewards N(.5, .20) x 8 of one prompt and N(.8, .01) x 8 of another, (1, 2, 8)."""
    rng = np.random.default_rng(0)
    return np.stack([rng.normal(0.5, 0.20, 8), rng.normal(0.8, 0.01, 8)])[None]


@pytest.mark.parametrize("standardise", [True, False])
def test_a_batch_wide_std_keeps_the_difference_of_two_prompts_spreads(standardise):
    advantage = scored(uneven(), [1.0], AdvantageRule(spread="batch", standardise=standardise)).advantage
    assert advantage.std(1, correction=0).tolist() == pytest.approx([0.820, 0.051], abs=5e-4)


def test_a_group_std_removes_it():
    advantage = scored(uneven(), [1.0]).advantage
    assert advantage.std(1, correction=0).tolist() == pytest.approx([1, 1], abs=0.02)  # eps 1e-4 on a std of .005


@pytest.mark.parametrize("rule", [AdvantageRule(), AdvantageRule("group", "batch")])
def test_one_reward_is_never_standardised_whatever_else_is_measured(rule):
    scores = np.concatenate([uneven(), 100 * uneven()[:, ::-1]])
    alone, watched = scored(uneven(), [2.0], rule), scored(scores, [2.0, 0.0], rule)
    assert torch.equal(alone.combined, torch.as_tensor(2 * uneven()[0]))
    assert torch.equal(watched.advantage, alone.advantage)
    expected = clip_advantage(group_advantage(torch.as_tensor(2 * uneven()[0]), rule.spread), 5.0)
    assert torch.equal(alone.advantage, expected)


def test_in_a_window_an_improving_prompt_has_a_mean_advantage_above_0():
    window, rule = PromptWindow(32, 8), AdvantageRule("window")
    rng = np.random.default_rng(1)
    for mean in (0.2, 0.4, 0.6):
        result = scored(rng.normal(mean, 0.1, (1, 2, 8)), [1.0], rule, window)
    assert (result.advantage.mean(1) > 0.5).all()
    grouped = scored(rng.normal(0.8, 0.1, (1, 2, 8)), [1.0])
    assert grouped.advantage.mean(1).tolist() == pytest.approx([0, 0], abs=1e-12)


@pytest.mark.parametrize("kind", ["group", "window"])
def test_several_rewards_in_a_window_improve_together(kind):
    window, rng = PromptWindow(32, 8), np.random.default_rng(1)
    for mean in (0.2, 0.4, 0.6):
        scores = np.stack([rng.normal(mean, 0.1, (2, 8)), 50 * rng.normal(mean, 0.1, (2, 8))])
        result = scored(scores, [1.0, 1.0], AdvantageRule(kind), window)
    means = result.advantage.mean(1)
    assert (means > 0.5).all() if kind == "window" else means.abs().max() < 1e-12


@pytest.mark.parametrize(("kind", "spread"), [("group", "group"), ("group", "batch"), ("window", "group")])
def test_several_standardised_rewards_do_not_depend_on_their_units(kind, spread):
    rng, rule = np.random.default_rng(2), AdvantageRule(kind, spread)
    scores = rng.normal(0.5, 0.2, (2, 2, 20))
    units = scores * np.array([1000.0, 1.0])[:, None, None] + np.array([-70.0, 3.0])[:, None, None]
    plain, scaled = scored(scores, [1.0, 0.5], rule), scored(units, [1.0, 0.5], rule)
    torch.testing.assert_close(plain.advantage, scaled.advantage, rtol=1e-3, atol=1e-3)  # eps is not scaled


def test_several_rewards_over_the_batch_by_hand():
    scores = np.array([[[1.0, 3.0], [5.0, 7.0]], [[2.0, 0.0], [2.0, 0.0]]])
    first, second = (scores[0] - 4) / np.sqrt(5), (scores[1] - 1) / 1.0
    combined = torch.as_tensor(first + 0.5 * second)
    result = scored(scores, [1.0, 0.5], AdvantageRule("group", "batch"))
    torch.testing.assert_close(result.combined, combined, rtol=1e-3, atol=1e-3)  # eps 1e-4
    torch.testing.assert_close(result.advantage, group_advantage(combined, "batch"), rtol=1e-3, atol=1e-3)


def test_several_rewards_in_a_window_by_hand():
    window = PromptWindow(4, 2, eps=0.0)
    scores = np.array([[[0.0, 2.0, 4.0]], [[1.0, 0.0, 1.0]]])
    result = scored(scores, [1.0, 2.0], AdvantageRule("window"), window, ["a"])
    z = np.array([(s - s.mean()) / s.std() for s in scores[:, 0]])
    combined = z[0] + 2 * z[1]
    assert result.combined[0].tolist() == pytest.approx(combined)
    assert result.advantage[0].tolist() == pytest.approx(combined / combined.std())
    assert window.state_dict()["windows"] == {"a": [[0.0, 1.0], [2.0, 0.0], [4.0, 1.0]]}


def test_a_window_of_one_reward_standardised_as_several_equals_the_plain_window():
    first, second, rng = PromptWindow(8, 4), PromptWindow(8, 4), np.random.default_rng(3)
    for _ in range(3):
        scores = torch.as_tensor(rng.normal(0.5, 0.2, (1, 2, 4)))
        plain = first.advantage(PROMPTS, scores[0])
        several = second.advantage_of_several(PROMPTS, scores, [1.0])[1]
        torch.testing.assert_close(plain, several, rtol=1e-4, atol=1e-4)  # eps enters twice


def test_raw_sums_take_the_rewards_as_they_are():
    scores = np.array([[[1.0, 3.0], [0.0, 4.0]], [[10.0, 0.0], [5.0, 5.0]]])
    result = scored(scores, [1.0, 0.25], AdvantageRule(standardise=False))
    assert result.combined.tolist() == [[3.5, 3.0], [1.25, 5.25]]


@pytest.mark.parametrize("kind", ["group", "window"])
def test_a_failed_sample_of_one_of_several_rewards_trains_nothing(kind):
    scores = [[[1.0, NAN, 3.0], [0, 1, 2]], [[10.0, 1.0, 0.0], [5, 4, 6]]]
    window = PromptWindow(8, 2)
    result = scored(scores, [1.0, 0.25], AdvantageRule(kind), window)
    assert result.combined.isnan().tolist() == [[False, True, False], [False] * 3]
    assert result.advantage[0, 1] == 0
    assert result.advantage.isfinite().all()
    if kind == "window":
        assert window.state_dict()["windows"]["a"] == [[1.0, 10.0], [3.0, 0.0]]


def test_a_failure_of_a_reward_that_is_only_measured_harms_nothing():
    scores = np.concatenate([uneven(), np.full_like(uneven(), NAN)])
    assert torch.equal(scored(scores, [1.0, 0.0]).advantage, scored(uneven(), [1.0]).advantage)


def test_a_prompt_without_spread_trains_nothing_in_a_window_of_several():
    result = scored(np.full((2, 2, 4), 0.1), [1.0, 1.0], AdvantageRule("window"), PromptWindow(8, 2))
    assert not result.advantage.any()


def test_standardising_over_the_batch_keeps_the_groups_apart():
    z = combine_rewards(torch.as_tensor(uneven()), [1.0], population="batch")
    assert z.flatten().std(correction=0).item() == pytest.approx(1, abs=1e-3)
    assert z[1].mean() > z[0].mean()


def test_a_resumed_window_of_several_equals_an_uninterrupted_one():
    first, second, rng = PromptWindow(8, 4), PromptWindow(8, 4), np.random.default_rng(4)
    first.advantage_of_several(PROMPTS, torch.as_tensor(rng.normal(size=(2, 2, 4))), [1.0, 1.0])
    second.load_state_dict(first.state_dict())
    scores = torch.as_tensor(rng.normal(size=(2, 2, 4)))
    results = [w.advantage_of_several(PROMPTS, scores, [1.0, 1.0])[1] for w in (first, second)]
    assert torch.equal(*results)
