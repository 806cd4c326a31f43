"""One line of metrics.jsonl; docs/metrics.md explains each key."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config.schema import Config
from .plan import Plan
from .scoring import ScoredRollout, Stopwatch
from .statistics import StepStatistics


@dataclass(frozen=True)
class Measured:
    """What was measured of one update."""

    plan: Plan
    scored: ScoredRollout
    statistics: StepStatistics
    seconds: Stopwatch
    learning_rate: float


def record(measured: Measured, config: Config) -> dict[str, Any]:
    """An update's metrics."""
    plan, scored, statistics = measured.plan, measured.scored, measured.statistics
    scores, combined = scored.scores, scored.combined
    trained = (*config.reward.weights, *config.reward.constraints)
    weighted = torch.stack([scored.weights[name] * scores[name] for name in config.reward.weights]).sum(0)
    return {
        "update": plan.number,
        "reward_mean": finite_mean(weighted),
        "reward_std": finite_std(weighted),
        "reward_groups": [finite_mean(group) for group in weighted.view(combined.shape)],
        "rewards": {name: finite_mean(scores[name]) for name in trained},
        "rewards_std": {name: finite_std(scores[name]) for name in trained},
        **({"weights": scored.weights} if config.reward.schedule or config.reward.constraints else {}),
        "held_out": {name: finite_mean(scores[name]) for name in config.reward.held_out},
        "failed": int((~combined.isfinite()).sum()),
        "advantage_mean": finite_mean(scored.advantage),
        "advantage_abs_max": float(scored.advantage.abs().max()),
        **statistics.overall(),
        "per_step": {
            "steps": plan.trained,
            **statistics.per_step(),
            "std": [plan.transitions[i].std for i in plan.trained],
            "weight": [plan.transitions[i].weight for i in plan.trained],
            "target_weight": [float(plan.steps.weights[i]) for i in plan.trained],
        },
        "model_evaluations": statistics.evaluations,
        "learning_rate": measured.learning_rate,
        **{f"seconds_{name}": seconds for name, seconds in measured.seconds.rounded().items()},
        "seconds_rewards": scored.seconds.rounded(),
    }


def finite_mean(values: Tensor) -> float:
    """Mean of the finite values; NaN where there are none."""
    return float(values[values.isfinite()].mean())


def finite_std(values: Tensor) -> float:
    """Population standard deviation of the finite values; NaN where there are none."""
    return float(values[values.isfinite()].std(correction=0))
