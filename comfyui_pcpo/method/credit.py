"""Native to target weights of the trained steps."""

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


def target_weights(steps: Sequence[Transition], grid: Grid, credit: Credit, trained: Sequence[int]) -> Tensor:
    """Target weight w~ of every step, 0 where it is not trained, -> (T,) float64.

    With w the native weights -B / s and S the trained steps; every credit keeps sum_S w~ = sum_S w:

        native         w
        proportionate  zeta dt,  zeta = sum_S w / sum_S dt      PCPO (arXiv 2509.25774)
        uniform        mean_S w
        tempflow       w s, rescaled                            TempFlow-GRPO (arXiv 2508.04324)
        guard          |B|, rescaled; guard_dt: |B| / dt        GRPO-Guard (arXiv 2510.22319), RatioNorm
    """
    chosen = _check_trained(steps, grid, trained)
    if credit not in CREDITS:
        raise ValueError(f"credit is {credit!r}, but it must be one of {', '.join(CREDITS)}.")
    dt = grid.dt[chosen]
    w = dt.new_tensor([steps[i].weight for i in chosen])
    size, std = dt.new_tensor([abs(steps[i].b) for i in chosen]), dt.new_tensor([steps[i].std for i in chosen])
    shape = CREDITS[credit](StepQuantities(w, dt, size, std))
    weights = dt.new_zeros(grid.steps)
    weights[chosen] = shape * (w.sum() / shape.sum())
    return weights


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
