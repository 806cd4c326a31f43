"""Native to target weights of the trained steps, and weights outside the clip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the configuration reads this module's names without loading torch
    from torch import Tensor

    from comfyui_pcpo.method.schedule import Grid
    from comfyui_pcpo.method.transition import Transition

Credit = str


@dataclass(frozen=True)
class StepQuantities:
    """What a credit may depend on, each (S,) float64 over the trained steps."""

    weight: Tensor  # native weight w = -B / s
    dt: Tensor  # share of the trajectory
    size: Tensor  # |B|, by how much the mean follows the model's output
    std: Tensor  # s


# each: the target weights up to a constant, (S,)
CREDITS: dict[Credit, Callable[[StepQuantities], Tensor]] = {
    "native": lambda step: step.weight,
    "proportionate": lambda step: step.dt,
    "uniform": lambda step: step.weight.new_ones(len(step.weight)),
    "tempflow": lambda step: step.weight * step.std,
    "guard": lambda step: step.size,
    "guard_dt": lambda step: step.size / step.dt,
}


# each: a factor on the loss of a step, outside the clip, up to a constant, (S,)
LOSS_WEIGHTS: dict[str, Callable[[StepQuantities], Tensor]] = {
    "none": lambda step: step.weight.new_ones(len(step.weight)),
    "tempflow": lambda step: step.std,
}


@dataclass(frozen=True)
class PublishedWeighting:
    """How a published method weights its steps: credit inside the log-ratio, its form, and a factor outside the clip.

    A credit that is not `rescaled` keeps the published constant, to which the published clip range belongs.
    """

    credit: Credit
    form: str
    rescaled: bool = True
    loss_weight: str = "none"


# PCPO, TempFlow-GRPO (arXiv 2508.04324): the loss times s; GRPO-Guard (arXiv 2510.22319): |B| / dt, without the bias
PUBLISHED: dict[str, PublishedWeighting] = {
    "pcpo": PublishedWeighting("proportionate", "exact"),
    "tempflow_grpo": PublishedWeighting("native", "exact", loss_weight="tempflow"),
    "grpo_guard": PublishedWeighting("guard_dt", "linear", rescaled=False),
}


# whose constant is right without rescaling: published ones, and the native weights themselves
UNSCALED = {"native"} | {how.credit for how in PUBLISHED.values() if not how.rescaled}


def target_weights(
    steps: Sequence[Transition], grid: Grid, credit: Credit, trained: Sequence[int], rescaled: bool = True
) -> Tensor:
    """Target weight w~ of every step, 0 where it is not trained, -> (T,) float64.

    With w the native weights -B / s and S the trained steps; every `rescaled` credit keeps sum_S w~ = sum_S w. A run
    takes S as all steps that it may train, each of them stochastic: over the steps of one update (a window, a branch, a
    random share), zeta would vary from update to update, and a window of one step would have its native weight.

        native         w
        proportionate  zeta dt,  zeta = sum_S w / sum_S dt      PCPO (arXiv 2509.25774)
        uniform        mean_S w
        tempflow       w s, rescaled                            TempFlow-GRPO (arXiv 2508.04324)
        guard          |B|, rescaled; guard_dt: |B| / dt        GRPO-Guard (arXiv 2510.22319), RatioNorm
    """
    chosen = _check_trained(steps, grid, trained)
    if credit not in CREDITS:
        raise ValueError(f"credit is {credit!r}, but it must be one of {', '.join(CREDITS)}.")
    quantities = _quantities(steps, grid, chosen)
    shape = CREDITS[credit](quantities)
    weights = grid.dt.new_zeros(grid.steps)
    weights[chosen] = shape * (quantities.weight.sum() / shape.sum()) if rescaled else shape
    return weights


def loss_weights(steps: Sequence[Transition], grid: Grid, kind: str, trainable: Sequence[int]) -> Tensor:
    """Factor on the loss of every step outside the clip, mean 1 over `trainable` and 0 elsewhere, -> (T,) float64.

        none      1
        tempflow  s     TempFlow-GRPO (arXiv 2508.04324), noise-aware weighting of the policy loss

    Inside the log-ratio the same factor (credit tempflow) changes which terms are clipped; here it does not.
    """
    if kind not in LOSS_WEIGHTS:
        raise ValueError(f"loss_weight is {kind!r}, but it must be one of {', '.join(LOSS_WEIGHTS)}.")
    chosen = _check_trained(steps, grid, trainable)
    shape = LOSS_WEIGHTS[kind](_quantities(steps, grid, chosen))
    weights = grid.dt.new_zeros(grid.steps)
    weights[chosen] = shape / shape.mean()
    return weights


def level_weights(grid: Grid, credit: Credit, trainable: Sequence[int]) -> Tensor:
    """Factor on a forward-process loss at every level, mean 1 over `trainable`, 0 elsewhere, -> (T,) float64.

    uniform: 1;  proportionate: dt, PCPO's credit for levels that need no noise and so have no native weight
    """
    if credit not in ("uniform", "proportionate"):
        raise ValueError(f"credit is {credit!r}, but levels are weighted 'uniform' or 'proportionate'.")
    chosen = sorted(trainable)
    shape = grid.dt[chosen] if credit == "proportionate" else grid.dt.new_ones(len(chosen))
    weights = grid.dt.new_zeros(grid.steps)
    weights[chosen] = shape / shape.mean()
    return weights


def _quantities(steps: Sequence[Transition], grid: Grid, chosen: list[int]) -> StepQuantities:
    dt = grid.dt[chosen]
    columns = ([s.weight for s in steps], [abs(s.b) for s in steps], [s.std for s in steps])
    weight, size, std = (dt.new_tensor([column[i] for i in chosen]) for column in columns)
    return StepQuantities(weight, dt, size, std)


def _check_trained(steps: Sequence[Transition], grid: Grid, trained: Sequence[int]) -> list[int]:
    """The trained steps in order; refuses repeats, steps off the grid and steps without noise."""
    chosen = sorted(int(i) for i in trained)
    if len(steps) != grid.steps:
        raise ValueError(
            f"there are {len(steps)} transitions for a grid of {grid.steps} steps. Make both from one grid."
        )
    if not chosen or len(set(chosen)) != len(chosen) or not 0 <= chosen[0] <= chosen[-1] < grid.steps:
        raise ValueError(
            f"trained steps are {chosen}, but must be different numbers from 0 to {grid.steps - 1}, at least one."
        )
    for i in chosen:
        if steps[i].std == 0:
            raise ValueError(
                f"step {i} has std 0, but a step without noise has no ratio to train. "
                "Leave it out of the trained steps, or raise the noise level."
            )
    return chosen
