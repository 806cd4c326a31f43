"""What one update does, decided before it starts: its prompts, denoising steps, their credit, its minibatches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from comfyui_pcpo.method.rollout import GroupNoise, derive_seed
from comfyui_pcpo.method.samplers import AUTO_METHOD, Method, deterministic, transitions
from comfyui_pcpo.method.schedule import Grid
from comfyui_pcpo.method.transition import Transition

from ..config.schema import Config, ConfigError
from ..policy.base import Policy
from .distributed import Processes


class StepRules(Protocol):
    """What an objective says about the denoising steps."""

    def noise_level(self, method: Method) -> float:
        """The sampler's noise level where the configuration names none."""
        ...

    def trainable(self, steps: Sequence[Transition]) -> list[int]:
        """The steps that can be trained."""
        ...

    def weights(self, steps: Sequence[Transition], grid: Grid, trained: Sequence[int]) -> Tensor:
        """The credit of each step, (T,) float64."""
        ...


@dataclass(frozen=True)
class Plan:
    """One update's decisions; the same on every process but for `groups` and `minibatches`, which are its own."""

    number: int  # from 1
    grid: Grid  # the noise levels of its T steps
    transitions: list[Transition]  # (T,)
    trained: list[int]  # the steps that are differentiated, in order
    weights: Tensor  # (T,) the credit of each step
    prompts: list[str]  # (P,) the prompts of all processes
    groups: list[int]  # this process's groups, indices into prompts
    group_size: int
    minibatches: list[list[Tensor]]  # [minibatch][chunk] -> (rows,) of this process's images

    @property
    def chunks(self) -> list[Tensor]:
        """The rows of each model call."""
        return [rows for part in self.minibatches for rows in part]

    @property
    def texts(self) -> list[str]:
        """The prompt of each image of this process, (B,)."""
        return [self.prompts[group] for group in self.groups for _ in range(self.group_size)]

    def noise(self, seed: int, shape: Sequence[int], *source: int, shared: bool = False) -> GroupNoise:
        """Noise for this process's groups; every `source` is independent of the others."""
        seeds = [derive_seed(seed, self.number, group, *source) for group in self.groups]
        return GroupNoise(seeds, self.group_size, shape, shared)


def make_plan(policy: Policy, config: Config, rules: StepRules, prompts: Sequence[str], number: int) -> Plan:
    """Plan update `number` over a list of prompts."""
    r, grid = config.rollout, policy.grid(config.rollout.steps)
    steps, trained = plan_steps(policy, config, rules, number)
    groups = Processes().share(r.prompts_per_update)
    return Plan(
        number=number,
        grid=grid,
        transitions=steps,
        trained=trained,
        weights=rules.weights(steps, grid, trained),
        prompts=[prompts[p] for p in choose_prompts(len(prompts), r.prompts_per_update, config.run.seed, number)],
        groups=groups,
        group_size=r.group_size,
        minibatches=chunked(config, len(groups)),
    )


def sampler_method(policy: Policy, config: Config) -> Method:
    """`auto` resolved: ddim for epsilon models, flow_sde for flow models."""
    return AUTO_METHOD[policy.kind] if config.rollout.method == "auto" else config.rollout.method


def training_transitions(policy: Policy, config: Config, rules: StepRules, grid: Grid) -> list[Transition]:
    """The stochastic steps that the configuration asks for, (T,), before any window."""
    r, method = config.rollout, sampler_method(policy, config)
    level = rules.noise_level(method) if r.noise_level is None else r.noise_level
    try:
        return transitions(grid, method, level, r.sigma, r.target_weight)
    except ValueError as error:
        raise ConfigError(f"rollout: {error}") from None


def plan_steps(policy: Policy, config: Config, rules: StepRules, number: int) -> tuple[list[Transition], list[int]]:
    """The update's transitions, (T,), and which of them are trained: the window, then a random share."""
    r, grid = config.rollout, policy.grid(config.rollout.steps)
    steps = training_transitions(policy, config, rules, grid)
    rng = np.random.default_rng([config.run.seed, number, 1])
    last = grid.steps if config.objective.last_step else grid.steps - 1
    if r.sde_window:
        start = int(rng.integers(0, max(1, last - r.sde_window + 1)))
        window = range(start, start + r.sde_window)
        steps = [s if i in window else ode for i, (s, ode) in enumerate(zip(steps, deterministic(grid), strict=True))]
    trainable = [i for i in rules.trainable(steps) if i < last]
    if not trainable:
        raise ConfigError(
            f"none of the {grid.steps} steps is stochastic (noise_level {r.noise_level}), so none can be trained. "
            "Use a noise_level above 0."
        )
    share = max(1, round(len(trainable) * config.objective.train_steps))
    return steps, sorted(rng.choice(trainable, share, replace=False).tolist())


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
