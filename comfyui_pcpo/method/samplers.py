"""The stochastic samplers by name, and the steps of a run. A new one is a file with its step and a line in SAMPLERS."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from comfyui_pcpo.method.ddim_variance import (
    SIGMAS,
    Sigma,
    check_target,
    ddim_native_sigma,
    ddim_sigma,
    smallest_target,
)
from comfyui_pcpo.method.transition import Transition, cps, dance_sde, ddim, flow_sde

if TYPE_CHECKING:  # the configuration reads this module's names without loading torch
    from comfyui_pcpo.method.schedule import Grid, Kind

Method = str


@dataclass(frozen=True)
class Sampler:
    """A stochastic sampler: the grids that it runs on, its step, and its noise levels."""

    kind: Kind
    step: Callable[[float, float, float], Transition]  # (level, next level, noise level)
    noise_level: float  # of the published recipe
    highest: float = math.inf  # largest noise level that its step allows


SAMPLERS: dict[Method, Sampler] = {
    "ddim": Sampler("ddim", lambda ab, ab_prev, eta: ddim(ab, ab_prev, ddim_native_sigma(ab, ab_prev, eta)), 1.0, 1.0),
    "dance_sde": Sampler("flow", dance_sde, 0.3),
    "flow_sde": Sampler("flow", flow_sde, 0.7),
    "cps": Sampler("flow", cps, 0.7, 1.0),
}
METHODS: tuple[Method, ...] = tuple(SAMPLERS)
AUTO_METHOD: dict[Kind, Method] = {"ddim": "ddim", "flow": "flow_sde"}


def resolve_method(method: str, kind: Kind) -> Method:
    """The sampler that a configuration names; `auto` is the usual one of a kind of grid."""
    return AUTO_METHOD[kind] if method == "auto" else method


@dataclass(frozen=True)
class SamplerSettings:
    """The stochastic sampler of a run."""

    method: Method
    noise_level: float
    sigma: Sigma = "native"  # ddim only
    target: float | None = None  # w* of sigma = paper and uniform

    def transitions(self, grid: Grid) -> list[Transition]:
        """Every step stochastic, (T,)."""
        return transitions(grid, self.method, self.noise_level, self.sigma, self.target)


def default_noise_level(method: Method) -> float:
    """The noise level of the published recipes: ddim eta 1, dance_sde eta 0.3, flow_sde and cps 0.7."""
    return SAMPLERS[method].noise_level


def deterministic(grid: Grid) -> list[Transition]:
    """The ODE steps of a grid, std 0, T of them: DDIM with eta 0, or Euler  x' = x - v dt."""
    if grid.kind == "ddim":
        return [ddim(ab_t, ab_prev, 0.0) for ab_t, ab_prev in _pairs(grid)]
    return [Transition(1.0, -dt, 0.0) for dt in grid.dt.tolist()]


def transitions(
    grid: Grid, method: Method, noise_level: float, sigma: Sigma = "native", target: float | None = None
) -> list[Transition]:
    """All T steps of a run. A noise level of 0 is the deterministic sampler; `sigma` and `target` belong to ddim."""
    _check_method(grid, method, noise_level)
    _check_sigma(grid, method, noise_level, sigma, target)
    if noise_level == 0:
        return deterministic(grid)
    if sigma != "native":
        return [ddim(*pair, ddim_sigma(*pair, sigma, target)) for pair in _pairs(grid)]
    return [SAMPLERS[method].step(*pair, noise_level) for pair in _pairs(grid)]


def _pairs(grid: Grid) -> list[tuple[float, float]]:
    """The T pairs (level, next level)."""
    levels: list[float] = grid.levels.tolist()
    return list(pairwise(levels))


def _check_method(grid: Grid, method: Method, noise_level: float) -> None:
    if method not in SAMPLERS:
        raise ValueError(f"method is {method!r}, but it must be one of {', '.join(METHODS)}.")
    if SAMPLERS[method].kind != grid.kind:
        fits = " or ".join(name for name, sampler in SAMPLERS.items() if sampler.kind == grid.kind)
        raise ValueError(f"method is {method!r} on a {grid.kind} grid, but that grid takes {fits}. Change one of them.")
    highest = SAMPLERS[method].highest
    if not 0 <= noise_level <= highest or not math.isfinite(noise_level):
        raise ValueError(
            f"noise_level is {noise_level}, but {method} takes 0 to {highest:g}. "
            f"Use {default_noise_level(method)}, the published value."
        )


def _check_sigma(grid: Grid, method: Method, noise_level: float, sigma: Sigma, target: float | None) -> None:
    if sigma not in SIGMAS:
        raise ValueError(f"sigma is {sigma!r}, but it must be one of {', '.join(SIGMAS)}.")
    if sigma == "native":
        if target is not None:
            raise ValueError(
                f"target_weight is {target}, but sigma = 'native' has no target. "
                "Use sigma = 'uniform' or 'paper', or no target_weight."
            )
        return
    if method != "ddim":
        raise ValueError(f"sigma is {sigma!r}, but only ddim solves for its sigma, not {method}. Use sigma = 'native'.")
    if noise_level not in (0, 1):
        raise ValueError(
            f"noise_level is {noise_level}, but sigma = {sigma!r} sets the noise by its target. "
            "Use noise_level 1 (or 0 for the ODE)."
        )
    check_target(sigma, target, smallest_target(grid), f"one of the grid's {grid.steps} steps")
