"""What one update does, decided before it starts: its prompts, denoising steps, their credit, its minibatches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from comfyui_pcpo.method.branching import Branch, BranchPlan, choose_branches
from comfyui_pcpo.method.forward_process import ALL_OBJECTIVES
from comfyui_pcpo.method.rollout import GroupNoise, derive_seed
from comfyui_pcpo.method.samplers import Method, SamplerSettings, deterministic, resolve_method
from comfyui_pcpo.method.schedule import Grid
from comfyui_pcpo.method.trained_steps import Levels, StepSelection, choose_steps, stratified_levels
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

    def weights(self, steps: Sequence[Transition], grid: Grid, trainable: Sequence[int]) -> Tensor:
        """The credit of each step, a constant of the run, (T,) float64."""
        ...

    def loss_weights(self, steps: Sequence[Transition], grid: Grid, trainable: Sequence[int]) -> Tensor:
        """The factor on each step's loss, a constant of the run, (T,) float64."""
        ...


@dataclass(frozen=True)
class RunSteps:
    """The denoising steps of a run: the same in every update."""

    grid: Grid  # the noise levels of its T steps
    stochastic: list[Transition]  # (T,) every step with noise
    trainable: list[int]  # those that some update may train
    weights: Tensor  # (T,) the credit of each step
    loss_weights: Tensor  # (T,) the factor on each step's loss, outside the clip


@dataclass(frozen=True)
class Plan:
    """One update's decisions; the same on every process but for `groups` and `minibatches`, which are its own."""

    number: int  # from 1
    steps: RunSteps
    transitions: list[Transition]  # (T,) of this update
    trained: list[int]  # the steps that are differentiated, in order
    prompts: list[str]  # (P,) the prompts of all processes
    groups: list[int]  # this process's groups, indices into prompts
    group_size: int
    minibatches: list[list[Tensor]]  # [minibatch][chunk] -> (rows,) of this process's images
    loss_weights: Tensor  # (T,) the factor on each step's loss in this update
    branches: BranchPlan | None = None  # of this process's groups

    @property
    def grid(self) -> Grid:
        return self.steps.grid

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
        return GroupNoise(seeds, self.group_size, shape, shared or self.branches is not None)


def make_plan(policy: Policy, config: Config, rules: StepRules, prompts: Sequence[str], number: int) -> Plan:
    """Plan update `number` over a list of prompts."""
    r, steps, rng = (
        config.rollout,
        run_steps(policy, config, rules),
        np.random.default_rng([config.run.seed, number, 1]),
    )
    groups = Processes().share(r.prompts_per_update, r.branch_points)
    branches, loss_weights = None, steps.loss_weights
    if r.branch:
        starts = branch_starts(rng, steps, config)
        trained = sorted({start + k for start in starts for k in range(r.branch)})
        own = [Branch(starts[group], r.branch, group // r.branch_points) for group in groups]
        branches = BranchPlan(own, steps.stochastic, deterministic(steps.grid))
        transitions = steps.stochastic
    elif config.objective.levels:
        levels = stratified(rng, steps, config)
        transitions, trained = steps.stochastic, levels.steps
        loss_weights = loss_weights.index_copy(
            0, torch.tensor(trained), loss_weights[trained] * torch.tensor(levels.weights)
        )
    else:
        transitions, trained = plan_steps(rng, steps, config)
    return Plan(
        number=number,
        steps=steps,
        transitions=transitions,
        trained=trained,
        prompts=[prompts[p] for p in plan_prompts(len(prompts), config, number)],
        groups=groups,
        group_size=r.group_size,
        minibatches=chunked(config, len(groups)),
        loss_weights=loss_weights,
        branches=branches,
    )


def sampler_settings(policy: Policy, config: Config, rules: StepRules) -> SamplerSettings:
    """The configured stochastic sampler; `auto` is the usual method of the model's kind."""
    r = config.rollout
    method = resolve_method(r.method, policy.kind)
    level = rules.noise_level(method) if r.noise_level is None else r.noise_level
    return SamplerSettings(method, level, r.sigma, r.target_weight)


def training_transitions(policy: Policy, config: Config, rules: StepRules, grid: Grid) -> list[Transition]:
    """Every step of the configured sampler, (T,). Raises ConfigError where it does not fit the model."""
    try:
        return sampler_settings(policy, config, rules).transitions(grid)
    except ValueError as error:
        raise ConfigError(f"rollout: {error}") from None


def run_steps(policy: Policy, config: Config, rules: StepRules) -> RunSteps:
    """The steps of a run. Their credit is taken over all trainable steps, whichever of them an update trains."""
    o, grid = config.objective, policy.grid(config.rollout.steps)
    steps = training_transitions(policy, config, rules, grid)
    try:
        able = StepSelection(o.first_steps, o.skipped).of_run(rules.trainable(steps), grid.steps)
    except ValueError as error:
        raise ConfigError(f"rollout: {error}") from None
    return RunSteps(grid, steps, able, rules.weights(steps, grid, able), rules.loss_weights(steps, grid, able))


def plan_steps(rng: np.random.Generator, steps: RunSteps, config: Config) -> tuple[list[Transition], list[int]]:
    """An update's transitions, (T,), and which of them are trained: the SDE window, then a random share.

    The noise levels of an objective that does not replay the steps are no steps of the sampler: no window applies.
    """
    length, transitions, able = config.rollout.sde_window, steps.stochastic, steps.trainable
    if length:
        start = int(rng.integers(0, max(1, able[-1] + 2 - length)))
        window = range(start, start + length)
        pairs = zip(steps.stochastic, deterministic(steps.grid), strict=True)
        transitions = [noisy if i in window else ode for i, (noisy, ode) in enumerate(pairs)]
        if ALL_OBJECTIVES[config.objective.name].replays_steps:
            able = [i for i in able if i in window]
    return transitions, choose_steps(rng, able, config.objective.train_steps)


def stratified(rng: np.random.Generator, steps: RunSteps, config: Config) -> Levels:
    """An update's noise levels, one from each stratum. Raises ConfigError where there are fewer levels than strata."""
    try:
        return stratified_levels(rng, steps.trainable, config.objective.levels)
    except ValueError as error:
        raise ConfigError(f"objective.levels: {error}") from None


def branch_starts(rng: np.random.Generator, steps: RunSteps, config: Config) -> list[int]:
    """The branch step of every group of every process, (P,)."""
    r = config.rollout
    try:
        return choose_branches(rng, steps.trainable, r.prompts_per_update, r.branch, r.branch_first)
    except ValueError as error:
        raise ConfigError(f"rollout.branch: {error}") from None


def plan_prompts(count: int, config: Config, number: int) -> list[int]:
    """The prompt of each group of update `number`; groups that share a trunk share the prompt."""
    r = config.rollout
    drawn = choose_prompts(count, r.prompts_per_update // r.branch_points, config.run.seed, number)
    return [prompt for prompt in drawn for _ in range(r.branch_points)]


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
