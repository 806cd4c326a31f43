"""The model calls that `check` announces are those that a run makes."""

import pytest
from running import kept

from trainer.config.loading import merge
from trainer.loop.calls import count_model_calls
from trainer.memory.estimate import budget
from trainer.policy.loading import make_policy
from trainer.runs import launch

pytestmark = pytest.mark.slow

SMALL = {
    "rollout": {"prompts_per_update": 2, "group_size": 4, "steps": 4, "images_at_once": 3},
    "optimizer": {"minibatches": 2},
    "objective": {"last_step": False, "kl_every": 1},
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guard": {"every": 1, "prompts": 2, "images": 2, "action": "warn"}},
        {"rollout": {"branch": 1}, "objective": {"kl_images": 2}},
        {"rollout": {"branch": 2, "branch_points": 2}, "objective": {"kl_weight": 0.1}},
        {"rollout": {"sde_window": 2}, "optimizer": {"epochs": 2}},
        {"objective": {"name": "nft", "levels": 2, "kl_images": 0}},
    ],
    ids=["plain", "guard", "branch", "branch points, KL", "window, epochs", "nft"],
)
def test_the_counted_model_calls_are_those_of_a_run(make_config, options):
    config = make_config(**merge(SMALL, options))
    calls = []
    run = launch.start_run(config, lambda: calls.append(1))
    recorded = [update.metrics for update in kept(run)]
    counts, updates = count_model_calls(run.state.policy, config, len(run.job.prompts)), config.run.updates
    per_update = counts.rollout, counts.update, counts.reference
    made = updates * sum(count.calls for count in per_update) + (updates + 1) * counts.guard.calls
    assert len(calls) == pytest.approx(made)
    for name, count in zip(("rollout", "update", "reference"), per_update, strict=True):
        assert sum(row["model_evaluations"][name] for row in recorded) == pytest.approx(updates * count.evaluations)
    if config.guard.every:
        assert [row["guard"]["model_evaluations"] for row in recorded] == [counts.guard.evaluations] * updates


def test_check_announces_the_calls_of_the_guard_only_where_it_is_on(make_config):
    off = make_config(rollout={"steps": 4})
    policy = make_policy(off)
    assert not any("guard" in line for line in budget(policy, off).lines(off))
    on = make_config(rollout={"steps": 4}, guard={"every": 5, "prompts": 2, "images": 3})
    (line,) = [line for line in budget(policy, on).lines(on) if "guard" in line]
    assert line == "4 model calls (24 images) for the guard, every 5 updates and before the first one"
