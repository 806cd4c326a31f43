"""Advantages: groups, windows, failures, several rewards."""

import json

import numpy as np
import pytest
import torch

from comfyui_pcpo.method.advantage import PromptWindow, clip_advantage, combine_rewards, failed_share, group_advantage

NAN = float("nan")


def test_group_advantage_by_hand_with_the_population_std():
    a = group_advantage(torch.tensor([[1.0, 3.0], [0.0, 4.0]]).double(), eps=0.0)
    assert a.tolist() == [[-1.0, 1.0], [-1.0, 1.0]]


def test_batch_spread_divides_every_group_by_one_std():
    r = torch.tensor([[1.0, 3.0], [0.0, 4.0]]).double()
    a = group_advantage(r, "batch")
    assert torch.allclose(a, (r - r.mean(1, keepdim=True)) / (np.std(r.numpy()) + 1e-4))


@pytest.mark.parametrize("spread", ["group", "batch"])
def test_a_group_without_spread_trains_nothing(spread):
    # the float mean of seven 0.1 is not 0.1
    a = group_advantage(torch.tensor([[0.1] * 7, [0, 1, 2, 3, 4, 5, 6.0]]), spread)
    assert a[0].tolist() == [0.0] * 7
    assert a[1].abs().max() > 0.9


@pytest.mark.parametrize("spread", ["group", "batch"])
def test_a_batch_without_spread_trains_nothing(spread):
    assert group_advantage(torch.full((2, 3), 0.1), spread).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("spread", ["group", "batch"])
def test_a_failed_sample_leaves_the_statistics_and_trains_nothing(spread):
    full = group_advantage(torch.tensor([[1.0, 2.0, 4.0]]), spread)
    holed = group_advantage(torch.tensor([[1.0, NAN, 2.0, 4.0]]), spread)
    assert holed[0, [0, 2, 3]].tolist() == full[0].tolist()
    assert holed[0, 1] == 0


@pytest.mark.parametrize("spread", ["group", "batch"])
def test_a_lone_survivor_and_a_lost_group_train_nothing(spread):
    a = group_advantage(torch.tensor([[5.0, NAN, NAN], [NAN, NAN, NAN], [1.0, 2.0, 3.0]]), spread)
    assert a[:2].tolist() == [[0.0] * 3] * 2
    assert a[2, 2] > 0


def test_advantages_are_float32_or_wider():
    assert group_advantage(torch.tensor([[1.0, 2.0]]).half()).dtype == torch.float32
    assert group_advantage(torch.tensor([[1, 2]])).dtype == torch.float32
    assert group_advantage(torch.tensor([[1.0, 2.0]]).double()).dtype == torch.float64


def test_advantages_do_not_depend_on_a_large_offset():
    r = torch.tensor([[1.0, 2.0, 5.0]]).double()
    assert torch.allclose(group_advantage(r + 1e6), group_advantage(r), atol=1e-9)


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([[1.0], [2.0]], "group_size is 1, but advantages compare images of one prompt. Use 2 or more"),
        ([[NAN, NAN]], "all 2 samples failed"),
        ([[1.0, float("inf")]], "1 rewards are infinite"),
        ([1.0, 2.0], r"shape \(2,\), but \(P, G\)"),
    ],
)
def test_reward_errors_name_the_number_and_the_way_out(rewards, message):
    with pytest.raises(ValueError, match=message):
        group_advantage(torch.tensor(rewards))


def test_an_unknown_spread_is_refused():
    with pytest.raises(ValueError, match="spread is 'prompt'"):
        group_advantage(torch.zeros(1, 2), "prompt")  # type: ignore[arg-type]


def test_clip_advantage_bounds_both_sides():
    assert clip_advantage(torch.tensor([-7.0, -5.0, 1.0, 9.0])).tolist() == [-5.0, -5.0, 1.0, 5.0]
    with pytest.raises(ValueError, match="bound is 0"):
        clip_advantage(torch.zeros(1), 0)


def test_failed_share_counts_nan():
    assert failed_share(torch.tensor([[1.0, NAN], [2.0, 3.0]])) == 0.25


def test_standardised_rewards_do_not_depend_on_their_units():
    r = torch.tensor([[[1.0, 2.0, 4.0]], [[3.0, 1.0, 0.0]]]).double()
    big = r * torch.tensor([1000.0, 1.0]).double().reshape(2, 1, 1)
    assert torch.allclose(combine_rewards(r, [1, 2], eps=0.0), combine_rewards(big, [1, 2], eps=0.0))


def test_standardised_sum_by_hand():
    r = torch.tensor([[[1.0, 3.0]], [[10.0, 0.0]]]).double()
    assert combine_rewards(r, [1.0, 0.25], eps=0.0).tolist() == [[-0.75, 0.75]]


def test_raw_sum_by_hand():
    r = torch.tensor([[[1.0, 3.0]], [[10.0, 0.0]]])
    assert combine_rewards(r, [1.0, 0.25], standardise=False).tolist() == [[3.5, 3.0]]


def test_a_sample_that_fails_one_reward_leaves_all_statistics():
    r = torch.tensor([[[1.0, 9.0, 3.0], [0, 1, 2]], [[10.0, NAN, 0.0], [5, 5, 5]]])
    combined = combine_rewards(r, [1.0, 0.25], eps=0.0)
    assert combined[0, [0, 2]].tolist() == [-0.75, 0.75]
    assert combined.isnan().tolist() == [[False, True, False], [False] * 3]
    assert group_advantage(combined)[0, 1] == 0


def test_combine_rewards_errors():
    with pytest.raises(ValueError, match="1 weights for 2 rewards"):
        combine_rewards(torch.zeros(2, 1, 2), [1.0])
    with pytest.raises(ValueError, match="all 2 samples failed"):
        combine_rewards(torch.tensor([[[NAN, 1.0]], [[1.0, NAN]]]), [1.0, 1.0])


def test_a_short_window_falls_back_to_the_batch():
    r = torch.tensor([1.0, 2.0, 6.0])
    a = PromptWindow().advantage(["a", "a", "b"], r)
    assert torch.allclose(a, (r - 3) / (np.std([1, 2, 6]) + 1e-6))


def test_a_full_window_compares_a_prompt_with_itself():
    window = PromptWindow(size=4, min_count=2)
    window.advantage(["a", "a"], torch.tensor([0.0, 0.0]))
    a = window.advantage(["a", "a", "a", "b"], torch.tensor([1.0, 2.0, 3.0, 9.0]).double())
    # the window of four holds 0 1 2 3; b has one reward and takes the batch 1 2 3 9
    own, batch = [0, 1, 2, 3], [1, 2, 3, 9]
    expected = [(r - np.mean(own)) / (np.std(own) + 1e-6) for r in (1, 2, 3)]
    assert a.tolist() == pytest.approx([*expected, (9 - np.mean(batch)) / (np.std(batch) + 1e-6)])


def test_a_window_takes_groups_with_one_prompt_per_row():
    r = torch.tensor([[1.0, 2.0], [4.0, 9.0], [3.0, 5.0]])
    rows, flat = PromptWindow(8, 3), PromptWindow(8, 3)
    assert torch.equal(rows.advantage(["a", "b", "a"], r).flatten(), flat.advantage([*"aabbaa"], r.flatten()))
    assert rows.state_dict() == flat.state_dict()


def test_raw_sums_work_on_groups_of_one():
    r = torch.tensor([[[1.0], [2.0]]])
    assert combine_rewards(r, [2.0], standardise=False).tolist() == [[2.0], [4.0]]
    with pytest.raises(ValueError, match="group_size is 1"):
        combine_rewards(r, [2.0])


def test_failures_do_not_enter_the_window():
    window = PromptWindow(size=4, min_count=2)
    a = window.advantage(["a", "a", "a", "c"], torch.tensor([1.0, NAN, 3.0, NAN]))
    assert a.tolist() == pytest.approx([-1.0, 0.0, 1.0, 0.0], abs=1e-5)
    assert window.state_dict()["windows"] == {"a": [1.0, 3.0]}


def test_a_window_without_spread_trains_nothing():
    window = PromptWindow(size=4, min_count=2)
    assert window.advantage(["a"] * 3, torch.tensor([0.1] * 3)).tolist() == [0.0] * 3


def test_a_resumed_window_equals_an_uninterrupted_one():
    first, second = PromptWindow(size=4, min_count=2), PromptWindow(size=4, min_count=2)
    first.advantage(["a", "b", "a"], torch.tensor([1.0, 2.0, 3.0]))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    r = torch.tensor([0.0, 1.0, 5.0, 6.0])
    assert torch.equal(first.advantage(["a", "a", "b", "a"], r), second.advantage(["a", "a", "b", "a"], r))
    assert first.state_dict() == second.state_dict()


def test_a_window_goes_on_only_with_the_rewards_that_it_holds():
    before = PromptWindow(size=4, min_count=2, of=["sharpness", 1.0])
    before.advantage(["a", "a"], torch.tensor([1.0, 2.0]))
    state = json.loads(json.dumps(before.state_dict()))
    older = {"windows": state["windows"]}  # names no rewards
    for saved, of, kept in ((state, before.of, True), (state, ["sharpness", 2.0], False), (older, before.of, True)):
        after = PromptWindow(size=4, min_count=2, of=of)
        after.load_state_dict(saved)
        assert bool(after.windows) is kept


def test_a_window_that_is_made_shorter_keeps_the_newest_rewards():
    long, short = PromptWindow(size=4, min_count=2), PromptWindow(size=2, min_count=1)
    long.advantage(["a"] * 3, torch.tensor([1.0, 2.0, 3.0]))
    short.load_state_dict(long.state_dict())
    assert (short.size, short.min_count, list(short.windows["a"])) == (2, 1, [2.0, 3.0])


def test_window_errors():
    with pytest.raises(ValueError, match="min_count is 40 and size 32"):
        PromptWindow(32, 40)
    with pytest.raises(ValueError, match="1 prompts for 2 rows"):
        PromptWindow().advantage(["a"], torch.zeros(2))
