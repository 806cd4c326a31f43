"""What one update does, decided before it starts: its prompts, denoising steps, their credit, its minibatches."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from comfyui_pcpo.method.credit import target_weights
from comfyui_pcpo.method.forward_process import FORWARD
from comfyui_pcpo.method.schedule import Grid
from comfyui_pcpo.method.transition import Method, Transition, default_noise_level, deterministic, transitions

from ..config.schema import Config, ConfigError
from ..policy.base import Policy


@dataclass(frozen=True)
class Plan:
    """One update's decisions; the same on every process but for `minibatches`, which are rows of its own groups."""

    number: int  # from 1
    grid: Grid  # the noise levels of its T steps
    transitions: list[Transition]  # (T,)
    trained: list[int]  # the steps that are differentiated, rising
    weights: Tensor  # (T,) the credit of each step
    prompts: list[int]  # (P,) places in the list of prompts
    minibatches: list[list[Tensor]]  # [minibatch][chunk] -> (rows,)


def make_plan(policy: Policy, config: Config, prompts: int, groups: int, number: int) -> Plan:
    """Plan update `number` over a list of `prompts`, with `groups` of its groups on this process."""
    grid = policy.grid(config.rollout.steps)
    steps, trained = plan_steps(policy, config, grid, number)
    forward = config.objective.name in FORWARD
    weights = torch.ones(grid.steps) if forward else target_weights(steps, grid, config.objective.credit, trained)
    return Plan(
        number,
        grid,
        steps,
        trained,
        weights,
        choose_prompts(prompts, config.rollout.prompts_per_update, config.run.seed, number),
        chunked(config, groups),
    )


def sampler_method(policy: Policy, config: Config) -> Method:
    """`auto` resolved: ddim for epsilon models, flow_sde for flow models."""
    if config.rollout.method != "auto":
        return config.rollout.method
    return "ddim" if policy.kind == "ddim" else "flow_sde"


def training_transitions(policy: Policy, config: Config, grid: Grid) -> list[Transition]:
    """The stochastic steps that the configuration asks for, (T,), before any window."""
    r, method = config.rollout, sampler_method(policy, config)
    usual = 0.0 if config.objective.name in FORWARD else default_noise_level(method)
    level = usual if r.noise_level is None else r.noise_level
    try:
        return transitions(grid, method, level, r.sigma, r.target_weight)
    except ValueError as error:
        raise ConfigError(f"rollout: {error}") from None


def plan_steps(policy: Policy, config: Config, grid: Grid, number: int) -> tuple[list[Transition], list[int]]:
    """The update's transitions, (T,), and which of them are trained: the window, then a random share."""
    r, steps = config.rollout, training_transitions(policy, config, grid)
    rng = np.random.default_rng([config.run.seed, number, 1])
    last = grid.steps if config.objective.last_step else grid.steps - 1
    if r.sde_window:
        start = int(rng.integers(0, max(1, last - r.sde_window + 1)))
        inside = range(start, start + r.sde_window)
        steps = [s if i in inside else ode for i, (s, ode) in enumerate(zip(steps, deterministic(grid), strict=True))]
    able = [i for i in range(last) if steps[i].std > 0 or config.objective.name in FORWARD]
    if not able:
        raise ConfigError(
            f"0 of {grid.steps} steps are stochastic (noise_level {r.noise_level}), so none can be trained. "
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
