"""What an update costs, and so how many updates a run makes for a number of model evaluations."""

from functools import cache

from trainer.config.loading import build, with_options
from trainer.config.schema import Config
from trainer.loop.calls import AVERAGED, count_model_calls
from trainer.policy.base import Policy
from trainer.policy.loading import make_policy

COUNTED_BY = {"model": True, "rollout": True, "objective": True, "optimizer": {"epochs", "minibatches"}}
"""The parts of the configuration that decide the model evaluations of an update."""

COUNTED: dict[str, float] = {}
"""Model evaluations of an update, by these parts."""


def evaluations_per_update(config: Config) -> float:
    """Latents that the model predicts in an update: in rollouts, gradient steps and, where it is trained, the KL.

    The same for every seed; of branching rollouts the mean over some updates, whose branches start at other steps.
    """
    key = config.model_dump_json(include=COUNTED_BY)
    if key not in COUNTED:
        counted = with_options(config, {"run": {"updates": AVERAGED, "seed": 0}})
        calls = count_model_calls(policy_of(config.model.name), counted, 1)
        parts = [calls.rollout, calls.update, *([calls.reference] if config.trains_kl else [])]
        COUNTED[key] = sum(part.evaluations for part in parts)
    return COUNTED[key]


def updates_within(config: Config, evaluations: int, least: int) -> int:
    """The number of updates that makes about as many model evaluations, at least `least`."""
    return max(least, round(evaluations / evaluations_per_update(config)))


@cache
def policy_of(model: str) -> Policy:
    """A model on the CPU, whose noise levels the count needs."""
    return make_policy(build({"model": {"name": model, "device": "cpu"}}, "price"))
