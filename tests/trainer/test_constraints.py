"""Maximise one reward subject to another not below its start, and weights that follow a schedule."""

import pytest
import torch
from running import resume_run, start_run

from comfyui_pcpo.method.constraint import Constraint, scheduled_weight
from comfyui_pcpo.reward.color import Colorfulness
from trainer.config.loading import dump, load
from trainer.config.schema import ConfigError
from trainer.loop.scoring import RunError, check_failures
from trainer.runs.rows import ranked_mean, ranking_weights

CONSTRAINED = {"weights": {"colorfulness": 1.0}, "constraints": ["jpeg_compressibility"], "constraint_rate": 0.5}


def test_the_weight_of_a_constraint_by_hand():
    constraint = Constraint(rate=0.5, limit=1.0)
    weights = []
    for scores in (
        [1.0, 3.0],
        [0.0, 2.0],
        [1.0, 1.0],
        [4.0, 4.0],
        [-9.0, -9.0],
        [torch.nan, torch.nan],
        [torch.nan, 4.0],
    ):
        constraint.observe(torch.tensor(scores))
        weights.append(constraint.weight)
    assert (constraint.floor, constraint.unit) == (2.0, 1.0)
    assert weights == [0.0, 0.5, 1.0, 0.0, 1.0, 1.0, 0.0]


def test_a_reward_whose_first_scores_are_equal_constrains_from_its_first_fall_or_spread():
    fallen, spread = Constraint(rate=0.5), Constraint(rate=0.5)
    for scores in ([1.0, 1.0], [1.0, 1.0], [0.0, 0.0]):
        fallen.observe(torch.tensor(scores))
    assert (fallen.floor, fallen.unit, fallen.weight) == (1.0, 1.0, 0.5)
    for scores in ([1.0, 1.0], [0.0, 1.0]):
        spread.observe(torch.tensor(scores))
    assert (spread.unit, spread.weight) == (0.5, 0.5)


def test_a_scheduled_weight_by_hand():
    points = [(3, 1.0), (5, 0.0), (9, 2.0)]
    weights = [scheduled_weight(points, n) for n in (1, 3, 4, 5, 6, 9, 100)]
    assert weights == [1.0, 1.0, 0.5, 0.0, 0.5, 2.0, 2.0]


@pytest.mark.slow
def test_the_weights_of_a_run_follow_from_its_means(make_config, learn):
    name = "jpeg_compressibility"
    reward = CONSTRAINED | {"constraints": [name]}
    state, updates = learn(make_config(reward=reward, rollout={"group_size": 4}, run={"updates": 4}))
    rows = [update.metrics for update in updates]
    means, weights = ([row[key][name] for row in rows] for key in ("rewards", "weights"))
    unit, wanted = state.constraints[name].unit, [0.0]
    for mean in means[:-1]:
        wanted.append(min(max(wanted[-1] + 0.5 * (means[0] - mean) / unit, 0), 5))
    assert weights == pytest.approx(wanted, abs=1e-5) and weights[0] == 0 and any(weights)
    assert all(row["reward_mean"] == pytest.approx(row["rewards"]["colorfulness"]) for row in rows)


@pytest.mark.slow
def test_a_constrained_run_resumes_to_the_same_bits(make_config):
    reward = CONSTRAINED | {"schedule": {"colorfulness": [[1, 1.0], [4, 0.25]]}}
    rollout = {"group_size": 4}
    whole, updates = start_run(make_config(reward=reward, rollout=rollout, run={"updates": 4, "name": "whole"}))
    list(updates)
    half, updates = start_run(make_config(reward=reward, rollout=rollout, run={"updates": 2, "name": "half"}))
    list(updates)
    list(resume_run(half.path, updates=4)[2])
    assert [row["weights"] for row in whole.records()] == [row["weights"] for row in half.records()]
    assert [row["weights"]["colorfulness"] for row in half.records()] == [1.0, 0.75, 0.5, 0.25]
    pairs = whole.lora(), half.lora()
    for name in pairs[0]:
        assert all(torch.equal(a, b) for a, b in zip(pairs[0][name], pairs[1][name], strict=True))


class Fails(Colorfulness):
    """Fails from the second call on."""

    calls = 0

    def score_batch(self, images, prompts):
        self.calls += 1
        return super().score_batch(images, prompts) * (1 if self.calls == 1 else torch.nan)


@pytest.mark.slow
def test_an_undone_update_leaves_the_constraint_as_it_was(make_config, learn):
    config = make_config(reward=CONSTRAINED, rollout={"group_size": 4}, run={"updates": 3})
    state, updates = learn(config)
    next(updates)
    before = state.constraints["jpeg_compressibility"].state_dict()
    state.optimizer.step = None  # the next update fails after its scores were taken in
    with pytest.raises(TypeError):
        next(updates)
    assert state.constraints["jpeg_compressibility"].state_dict() == before and before["floor"] is not None


@pytest.mark.slow
def test_failures_of_a_constraint_stop_the_run_as_those_of_a_trained_reward(make_config, learn):
    config = make_config(reward=CONSTRAINED, rollout={"group_size": 4}, run={"updates": 2})
    _, updates = learn(config, rewards={"colorfulness": Colorfulness(), "jpeg_compressibility": Fails()})
    next(updates)
    with pytest.raises(RuntimeError, match=r"100 % of the jpeg_compressibility scores failed"):
        next(updates)


def test_a_scheduled_weight_may_be_given_as_0_and_the_last_ones_compare_updates(make_config):
    schedule = {"colorfulness": [[1, 0.0], [5, 2.0]]}
    reward = make_config(reward={"weights": {"colorfulness": 0.0}, "schedule": schedule}).reward
    assert (reward.weights_at(1), reward.last_weights) == ({"colorfulness": 0.0}, {"colorfulness": 2.0})
    row = {"rewards": {"colorfulness": 0.5}, "reward_mean": 9.0, "weights": {"colorfulness": 18.0}}
    assert ranked_mean(row, ranking_weights([row], reward)) == 1.0
    assert ranked_mean({"rewards": {"colorfulness": None}}, ranking_weights([row], reward)) is None


def test_rewards_that_fail_on_different_images_leave_nothing_to_compare(make_config):
    config = make_config(reward={"weights": {"colorfulness": 1.0, "redness": 1.0}, "max_failed": 0.6})
    scores = {"colorfulness": torch.tensor([torch.nan, 1.0]), "redness": torch.tensor([1.0, torch.nan])}
    with pytest.raises(RunError, match=r"update 3: every image has a failed score from one of colorfulness, redness"):
        check_failures(scores, {}, config, 3)
    check_failures(scores | {"redness": torch.tensor([torch.nan, 1.0])}, {}, config, 3)


def test_of_rewards_that_leave_nothing_to_compare_only_those_that_failed_are_named(make_config):
    config = make_config(reward=CONSTRAINED | {"weights": {"colorfulness": 1.0, "redness": 1.0}, "max_failed": 0.6})
    first, second = torch.tensor([torch.nan, 1.0]), torch.tensor([1.0, torch.nan])
    scores = {"colorfulness": first, "redness": torch.ones(2), "jpeg_compressibility": second}
    with pytest.raises(RunError, match=r"a failed score from one of colorfulness, jpeg_compressibility,"):
        check_failures(scores, {}, config, 3)


def test_scores_that_all_failed_are_not_told_to_exceed_a_limit_of_1(make_config):
    config = make_config(reward={"max_failed": 1.0})
    with pytest.raises(RunError, match=r"100 % of the colorfulness scores failed \(.*\), so none can be compared\."):
        check_failures({"colorfulness": torch.full((2,), torch.nan)}, {"colorfulness": Colorfulness()}, config, 3)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"reward": {"constraints": ["colorfulness"]}}, "constraints names colorfulness, which is named elsewhere"),
        ({"reward": {"constraints": ["redness", "redness"]}}, "constraints names redness"),
        ({"reward": {"schedule": {"redness": [[1, 1.0]]}}}, "schedule names redness, which reward.weights does not"),
        ({"reward": {"schedule": {"colorfulness": [[5, 1.0], [5, 2.0]]}}}, r"has the updates \[5, 5\]"),
        ({"reward": {"schedule": {"colorfulness": []}}}, r"has the updates \[\]"),
        ({"reward": {"schedule": {"colorfulness": [[1, 0.0]]}}}, "every weight of the schedule is 0"),
        ({"reward": {"weights": {"colorfulness": 0.0}}}, "every weight is 0, so nothing would be trained"),
        (
            {"reward": {"constraints": ["redness"]}, "advantage": {"kind": "window"}},
            "reward.constraints changes weights",
        ),
    ],
)
def test_constraints_and_schedules_that_do_not_fit_are_refused(make_config, sections, said):
    with pytest.raises(ConfigError, match=said):
        make_config(**sections)


def test_a_schedule_survives_its_file(make_config, tmp_path):
    config = make_config(reward=CONSTRAINED | {"schedule": {"colorfulness": [[1, 1.0], [4, 0.25]]}})
    (tmp_path / "c.toml").write_text(dump(config), encoding="utf-8")
    assert load(tmp_path / "c.toml").reward == config.reward
