"""THE loop: rollout -> score -> advantage -> update -> record."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from comfyui_pcpo.method.advantage import (
    PromptWindow,
    clip_advantage,
    combine_rewards,
    failed_share,
    group_advantage,
)
from comfyui_pcpo.method.forward_process import FORWARD
from comfyui_pcpo.method.rollout import GroupNoise, derive_seed, rollout
from comfyui_pcpo.reward.base import Reward

from ..config.schema import Config
from ..policy.base import Condition
from .distributed import Processes
from .forward_update import renoise
from .plan import Plan, make_plan
from .state import TrainingState
from .update import StepStatistics, improve
from .update_batch import UpdateBatch


class RunError(RuntimeError):
    """A run that cannot go on; the message says why and what to do."""


@dataclass
class Update:
    """One finished update: its record and its pictures."""

    number: int
    metrics: dict[str, Any]
    images: Tensor  # (B, H, W, 3) in [0, 1], group after group
    prompts: list[str]  # (B,)
    scores: Tensor  # (B,) what was trained on, before advantages


@dataclass
class Clock:
    """Seconds spent by name."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def rounded(self) -> dict[str, float]:
        return {name: round(seconds, 4) for name, seconds in self.seconds.items()}


@dataclass(frozen=True)
class Job:
    """What a learner is to do, and on what."""

    config: Config
    prompts: Sequence[str]
    rewards: dict[str, Reward]  # the trained and the held-out ones, by name
    processes: Processes = field(default_factory=Processes)
    tick: Callable[[], None] = lambda: None  # called before every model call; may raise


@contextmanager
def at_work(reward: Reward, leaves: bool) -> Iterator[Reward]:
    """The reward on its own device; where it `leaves` a GPU afterwards, the next rollout has that memory."""
    reward.to(reward.settings.device)
    try:
        yield reward
    finally:
        if leaves and reward.device.type != "cpu":
            reward.to("cpu")


def score(
    rewards: dict[str, Reward], images: Tensor, prompts: list[str], clock: Clock | None = None, offload: bool = True
) -> dict[str, Tensor]:
    """Every reward of every picture, -> name -> (B,); each reward's seconds go to the clock."""
    clock, found = clock or Clock(), {}
    for name, reward in rewards.items():
        with clock(name), at_work(reward, offload):
            found[name] = reward.score(images, prompts).float().cpu()
    return found


def advantages(scores: Tensor, prompts: Sequence[str], window: PromptWindow, config: Config) -> Tensor:
    """Combined rewards (P, G) -> clipped advantages (P, G); failed samples get 0."""
    a = config.advantage
    raw = window.advantage(list(prompts), scores) if a.kind == "window" else group_advantage(scores, a.spread)
    return clip_advantage(raw, a.clip)


def check_failures(scores: dict[str, Tensor], config: Config, number: int) -> None:
    """Raise RunError where more scores of one trained reward failed than the run allows, or all of them."""
    for name in config.reward.weights:
        share = failed_share(scores[name])
        if share > config.reward.max_failed or share == 1:
            raise RunError(
                f"update {number}: {100 * share:.0f} % of the {name} scores failed (NaN or infinite), more than "
                f"reward.max_failed = {config.reward.max_failed:g} allows. Look at the reward, then resume the run."
            )


@dataclass
class ScoredRollout:
    """What the rewards said of one update's pictures, those of every process."""

    scores: dict[str, Tensor]  # name -> (P * G,)
    combined: Tensor  # (P, G) what is trained on
    advantage: Tensor  # (P, G)


def judge(
    scores: dict[str, Tensor], prompts: Sequence[str], window: PromptWindow, config: Config, number: int
) -> ScoredRollout:
    """Scores of all groups and their prompts (P,) -> ScoredRollout; raises RunError where too many scores failed."""
    check_failures(scores, config, number)
    weights, size = config.reward.weights, config.rollout.group_size
    stacked = torch.stack([scores[name].view(-1, size) for name in weights])
    combined = combine_rewards(stacked, list(weights.values()), config.reward.standardise)
    return ScoredRollout(scores, combined, advantages(combined, prompts, window, config))


def align(learner: TrainingState, job: Job) -> Iterator[Update]:
    """Align the learner's policy, one Update after another, from `learner.done` to `config.run.updates`."""
    policy, config, prompts, processes = learner.policy, job.config, job.prompts, job.processes
    groups = processes.share(config.rollout.prompts_per_update)
    size, seed = config.rollout.group_size, config.run.seed
    condition = policy.encode(list(prompts))
    for number in range(learner.done + 1, config.run.updates + 1):
        with learner.all_or_nothing():
            clock, each = Clock(), Clock()
            with clock("rollout"):
                plan = make_plan(policy, config, len(prompts), len(groups), number)
                mine = [plan.prompts[g] for g in groups for _ in range(size)]
                batch = condition.rows(mine)

                def predict(x: Tensor, t: float, rows: Tensor, batch: Condition = batch) -> Tensor:
                    job.tick()
                    return policy.predict(x.to(policy.device), t, batch.rows(rows.tolist()))

                seeds = [derive_seed(seed, number, g) for g in groups]
                noise = GroupNoise(seeds, size, policy.latent_shape, config.rollout.shared_noise)
                chunks = [rows for part in plan.minibatches for rows in part]
                path = rollout(predict, plan.grid, plan.transitions, noise, chunks)
                images = torch.cat([policy.decode(x) for x in path.final.split(len(chunks[0]))])
            with clock("reward"):
                texts = [prompts[p] for p in mine]
                found = score(job.rewards, images, texts, each, config.reward.offload)
                scores = {name: processes.gather(value) for name, value in found.items()}
                judged = judge(scores, [prompts[p] for p in plan.prompts], learner.window, config, number)
            with clock("update"):
                own = processes.slice(judged.advantage.numel())
                advantage = judged.advantage.flatten()[own]
                if config.objective.name in FORWARD:
                    seeds = [derive_seed(seed, number, g, 1) for g in groups]
                    path = renoise(path, plan, GroupNoise(seeds, size, policy.latent_shape), predict)
                lesson = UpdateBatch(plan, path, advantage, predict, policy, config)
                statistics = improve(learner, lesson, processes)
            learner.done = number
            metrics = record(plan, judged, statistics, config)
            metrics["learning_rate"] = learner.optimizer.param_groups[0]["lr"]
            metrics |= {f"seconds_{name}": seconds for name, seconds in clock.rounded().items()}
            metrics["seconds_rewards"] = each.rounded()
        yield Update(number, metrics, images, texts, judged.combined.flatten()[own])


def record(plan: Plan, judged: ScoredRollout, statistics: StepStatistics, config: Config) -> dict[str, Any]:
    """One line of metrics.jsonl but for its seconds; docs/metrics.md explains each key."""
    scores, combined = judged.scores, judged.combined
    weighted = torch.stack([w * scores[name] for name, w in config.reward.weights.items()]).sum(0)
    return {
        "update": plan.number,
        "reward_mean": _mean(weighted),
        "reward_std": float(weighted[weighted.isfinite()].std(correction=0)),
        "reward_groups": [_mean(group) for group in weighted.view(combined.shape)],
        "rewards": {name: _mean(scores[name]) for name in config.reward.weights},
        "held_out": {name: _mean(scores[name]) for name in config.reward.held_out},
        "failed": int((~combined.isfinite()).sum()),
        "advantage_mean": _mean(judged.advantage),
        "advantage_abs_max": float(judged.advantage.abs().max()),
        **statistics.overall(),
        "per_step": {
            "steps": plan.trained,
            **statistics.per_step(),
            "std": [plan.transitions[i].std for i in plan.trained],
            "weight": [plan.transitions[i].weight for i in plan.trained],
            "target_weight": [float(plan.weights[i]) for i in plan.trained],
        },
    }


def _mean(values: Tensor) -> float:
    """Mean of the finite values; NaN where there are none."""
    return float(values[values.isfinite()].mean())
