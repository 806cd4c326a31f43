"""THE loop: rollout -> score -> advantage -> update -> record."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comfyui_pcpo.advantage import (
    PromptWindow,
    clip_advantage,
    combine_rewards,
    failed_share,
    group_advantage,
)
from comfyui_pcpo.credit import target_weights
from comfyui_pcpo.reward.base import Reward
from comfyui_pcpo.rollout import GroupNoise, Trajectory, derive_seed, rollout
from comfyui_pcpo.schedule import Grid
from comfyui_pcpo.transition import Method, Transition, default_noise_level, deterministic, transitions

from .config import Config, ConfigError
from .policy import Condition, Policy
from .processes import Processes
from .update import StepStatistics, improve


class RunError(RuntimeError):
    """A run that cannot go on; the message says why and what to do."""


@dataclass
class Learner:
    """What changes while a run goes on, and so what a checkpoint holds."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    window: PromptWindow
    done: int = 0  # updates finished

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Whatever ends the body early leaves LoRA, optimizer and window as they were before it."""
        parameters = self.policy.trainable()
        values = [p.detach().clone() for p in parameters]
        optimizer, window = copy.deepcopy(self.optimizer.state_dict()), copy.deepcopy(self.window.state_dict())
        try:
            yield
        except BaseException:
            with torch.no_grad():
                for p, value in zip(parameters, values, strict=True):
                    p.copy_(value)
                    p.grad = None
            self.optimizer.load_state_dict(optimizer)
            self.window.load_state_dict(window)
            raise


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

    def time(self, name: str, start: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def make_learner(policy: Policy, config: Config) -> Learner:
    o = config.optimizer
    optimizer = torch.optim.AdamW(
        policy.trainable(), lr=o.learning_rate, betas=(o.beta1, o.beta2), weight_decay=o.weight_decay
    )
    return Learner(policy, optimizer, PromptWindow(config.advantage.window, config.advantage.min_count))


def sampler_method(policy: Policy, config: Config) -> Method:
    """`auto` resolved: ddim for epsilon models, flow_sde for flow models."""
    if config.rollout.method != "auto":
        return config.rollout.method
    return "ddim" if policy.kind == "ddim" else "flow_sde"


def plan_steps(policy: Policy, config: Config, grid: Grid, number: int) -> tuple[list[Transition], list[int]]:
    """The update's transitions, (T,), and which of them are trained: the window, then a random share."""
    r, method = config.rollout, sampler_method(policy, config)
    level = default_noise_level(method) if r.noise_level is None else r.noise_level
    try:
        steps = transitions(grid, method, level, r.sigma, r.target_weight)
    except ValueError as error:
        raise ConfigError(f"rollout: {error}") from None
    rng = np.random.default_rng([config.run.seed, number, 1])
    last = grid.steps if config.objective.last_step else grid.steps - 1
    if r.sde_window:
        start = int(rng.integers(0, max(1, last - r.sde_window + 1)))
        inside = range(start, start + r.sde_window)
        steps = [s if i in inside else ode for i, (s, ode) in enumerate(zip(steps, deterministic(grid), strict=True))]
    able = [i for i in range(last) if steps[i].std > 0]
    if not able:
        raise ConfigError(
            f"0 of {grid.steps} steps are stochastic ({method}, noise_level {level}), so none can be trained. "
            "Use a noise_level above 0."
        )
    share = max(1, round(len(able) * config.objective.train_steps))
    return steps, sorted(rng.choice(able, share, replace=False).tolist())


def choose_prompts(count: int, wanted: int, seed: int, number: int) -> list[int]:
    """Prompts of update `number` (from 1): shuffled passes over the list, so each is seen equally often."""
    first = (number - 1) * wanted
    chosen = []
    for position in range(first, first + wanted):
        order = np.random.default_rng([seed, position // count, 2]).permutation(count)
        chosen.append(int(order[position % count]))
    return chosen


def chunked(config: Config, groups: int) -> list[list[Tensor]]:
    """Rows (group * G + image) of each minibatch, in chunks for one model call: [minibatch][chunk] -> (rows,).

    A minibatch takes every n-th image of every group, so it is the same whichever process holds which group.
    """
    size, parts = config.rollout.group_size, config.optimizer.minibatches
    rows = torch.arange(groups * size)
    return [list(rows[rows % size % parts == part].split(config.rollout.images_at_once)) for part in range(parts)]


def score(rewards: dict[str, Reward], images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    """Every reward of every picture, -> name -> (B,)."""
    return {name: reward.score(images, prompts).float().cpu() for name, reward in rewards.items()}


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


def align(
    learner: Learner,
    rewards: dict[str, Reward],
    prompts: Sequence[str],
    config: Config,
    processes: Processes | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Iterator[Update]:
    """Align the learner's policy, one Update after another, from `learner.done` to `config.run.updates`.

    `rewards` holds the trained and the held-out ones by name; `tick` is called before every model call and may raise.
    """
    policy, processes = learner.policy, processes or Processes()
    groups = processes.share(config.rollout.prompts_per_update)
    size, seed = config.rollout.group_size, config.run.seed
    grid = policy.grid(config.rollout.steps)
    condition = policy.encode(list(prompts))
    minibatches = chunked(config, len(groups))
    for number in range(learner.done + 1, config.run.updates + 1):
        with learner.all_or_nothing():
            clock, start = Clock(), time.perf_counter()
            steps, trained = plan_steps(policy, config, grid, number)
            weights = target_weights(steps, grid, config.objective.credit, trained)
            chosen = choose_prompts(len(prompts), config.rollout.prompts_per_update, seed, number)
            mine = [chosen[g] for g in groups]
            batch = condition.rows([p for p in mine for _ in range(size)])

            def predict(x: Tensor, t: float, rows: Tensor, batch: Condition = batch) -> Tensor:
                tick()
                return policy.predict(x.to(policy.device), t, batch.rows(rows.tolist()))

            noise = GroupNoise(
                [derive_seed(seed, number, g) for g in groups], size, policy.latent_shape, config.rollout.shared_noise
            )
            path = rollout(predict, grid, steps, noise, [rows for part in minibatches for rows in part])
            images = torch.cat([policy.decode(x) for x in path.final.split(config.rollout.images_at_once)])
            clock.time("rollout", start)

            start = time.perf_counter()
            texts = [prompts[p] for p in mine for _ in range(size)]
            scores = {name: processes.gather(value) for name, value in score(rewards, images, texts).items()}
            check_failures(scores, config, number)
            names = list(config.reward.weights)
            stacked = torch.stack([scores[name].view(-1, size) for name in names])
            combined = combine_rewards(stacked, list(config.reward.weights.values()), config.reward.standardise)
            everyone = [prompts[chosen[g]] for g in processes.order(config.rollout.prompts_per_update)]
            every_advantage = advantages(combined, everyone, learner.window, config)
            clock.time("reward", start)

            start = time.perf_counter()
            local = every_advantage.flatten()[processes.slice(len(every_advantage) * size)]
            statistics = improve(learner, path, local, weights, trained, minibatches, predict, config, processes)
            clock.time("update", start)
            learner.done = number
            metrics = record(
                number, scores, combined, every_advantage, statistics, learner, clock, path, weights, config
            )
            mine_only = combined.flatten()[processes.slice(combined.numel())]
        yield Update(number, metrics, images, texts, mine_only)


def record(
    number: int,
    scores: dict[str, Tensor],
    combined: Tensor,
    advantage: Tensor,
    statistics: StepStatistics,
    learner: Learner,
    clock: Clock,
    path: Trajectory,
    weights: Tensor,
    config: Config,
) -> dict[str, Any]:
    """One line of metrics.jsonl; docs/metrics.md explains each key."""
    weighted = torch.stack([w * scores[name] for name, w in config.reward.weights.items()]).sum(0)
    trained = statistics.steps
    return {
        "update": number,
        "reward_mean": _mean(weighted),
        "reward_std": float(weighted[weighted.isfinite()].std(correction=0)),
        "reward_groups": [_mean(group) for group in weighted.view(combined.shape)],
        "rewards": {name: _mean(scores[name]) for name in config.reward.weights},
        "held_out": {name: _mean(scores[name]) for name in config.reward.held_out},
        "failed": int((~combined.isfinite()).sum()),
        "advantage_mean": _mean(advantage),
        "advantage_abs_max": float(advantage.abs().max()),
        **statistics.overall(),
        "learning_rate": learner.optimizer.param_groups[0]["lr"],
        **{f"seconds_{name}": round(seconds, 4) for name, seconds in clock.seconds.items()},
        "per_step": {
            "steps": trained,
            **statistics.per_step(),
            "std": [path.transitions[i].std for i in trained],
            "weight": [path.transitions[i].weight for i in trained],
            "target_weight": [float(weights[i]) for i in trained],
        },
    }


def _mean(values: Tensor) -> float:
    """Mean of the finite values; NaN where there are none."""
    return float(values[values.isfinite()].mean())
