"""One Gaussian denoising step x' = a x + b out + std z: ddim, dance_sde, flow_sde and cps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from comfyui_pcpo.method.credit import SIGMAS, Sigma, check_target, ddim_native_sigma, ddim_sigma, smallest_target
from comfyui_pcpo.method.schedule import Grid

Method = Literal["ddim", "dance_sde", "flow_sde", "cps"]
METHODS: tuple[Method, ...] = get_args(Method)
_NOISE_LEVELS = {"ddim": 1.0, "dance_sde": 0.3, "flow_sde": 0.7, "cps": 0.7}


@dataclass(frozen=True)
class Transition:
    """One step x' = a x + b out + std z with z ~ N(0, I); `out` is epsilon (ddim) or velocity (flow)."""

    a: float
    b: float
    std: float

    @property
    def weight(self) -> float:
        """Native weight of the step in its log-ratio,  w = -b / std;  inf for a step without noise."""
        return -self.b / self.std if self.std else math.inf


def ddim(ab_t: float, ab_prev: float, sigma: float) -> Transition:
    """The DDIM step from alpha_bar `ab_t` to `ab_prev`, out = epsilon.

    DDIM (arXiv 2010.02502), Equation 12, as in PCPO:  x' = x / sqrt(a_t) - C eps + sigma z,
    C = a - sqrt(b^2 - sigma^2),  a_t = ab / ab',  a = sqrt(1 - ab) / sqrt(a_t),  b = sqrt(1 - ab')
    """
    room = 1 - ab_prev - sigma**2
    if room < -1e-12:
        raise ValueError(
            f"sigma is {sigma:g}, but a DDIM step cannot add more noise than its level sqrt(1 - ab_prev) = "
            f"{math.sqrt(1 - ab_prev):g}. Use a noise level (eta) of 1 or less."
        )
    a_t = ab_t / ab_prev
    total = math.sqrt((1 - ab_t) / a_t) + math.sqrt(max(0.0, room))
    return Transition(1 / math.sqrt(a_t), -(1 / a_t - 1 + sigma**2) / total, sigma)  # C = (a^2 - b^2 + sigma^2) / total


def dance_sde(t: float, t_next: float, eta: float) -> Transition:
    """The reverse SDE step with constant diffusion, out = v.

    DanceGRPO (arXiv 2505.07818):  x' = x - v dt - eta^2 / (2 t) (x + (1 - t) v) dt + eta sqrt(dt) z
    """
    dt = t - t_next
    pull = eta**2 / (2 * t)
    return Transition(1 - pull * dt, -dt * (1 + pull * (1 - t)), eta * math.sqrt(dt))


def flow_sde(t: float, t_next: float, noise_level: float, t_max: float) -> Transition:
    """The reverse SDE step with diffusion g = noise_level sqrt(t / (1 - t)), out = v.

    Flow-GRPO (arXiv 2505.05470):  x' = x - v dt - g^2 / (2 t) (x + (1 - t) v) dt + g sqrt(dt) z
    At t = 1 the 1 - t inside g, and only that one, becomes 1 - t_max: the code's sigma_max, the next level.
    """
    dt = t - t_next
    g2 = noise_level**2 * t / (1 - (t if t < 1 - 1e-6 else t_max))
    pull = g2 / (2 * t)
    return Transition(1 - pull * dt, -dt * (1 + pull * (1 - t)), math.sqrt(g2 * dt))


def cps(t: float, t_next: float, noise_level: float) -> Transition:
    """The coefficients-preserving step, out = v, x0 = x - t v, eps = x + (1 - t) v.

    Flow-CPS (arXiv 2509.05952):  x' = (1 - t') x0 + t' cos(h) eps + t' sin(h) z,  h = noise_level pi / 2
    """
    kept = t_next * math.cos(noise_level * math.pi / 2)
    return Transition(
        1 - t_next + kept, (1 - t) * kept - t * (1 - t_next), t_next * math.sin(noise_level * math.pi / 2)
    )


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
    if method == "ddim":
        return [ddim(*pair, _sigma(pair, noise_level, sigma, target)) for pair in _pairs(grid)]
    if method == "dance_sde":
        return [dance_sde(t, t_next, noise_level) for t, t_next in _pairs(grid)]
    if method == "cps":
        return [cps(t, t_next, noise_level) for t, t_next in _pairs(grid)]
    t_max = grid.levels[1].item()
    return [flow_sde(t, t_next, noise_level, t_max) for t, t_next in _pairs(grid)]


def default_noise_level(method: Method) -> float:
    """The noise level of the published recipes: ddim eta 1, dance_sde eta 0.3, flow_sde and cps 0.7."""
    return _NOISE_LEVELS[method]


def wide(x: Tensor) -> Tensor:
    """`x` in float32 or wider: ratios and latents do not survive fp16 and bf16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mean(x: Tensor, out: Tensor, tr: Transition) -> Tensor:
    """Mean of a step,  a x + b out,  (B, C, H, W) -> (B, C, H, W) float32 or wider."""
    return tr.a * wide(x) + tr.b * wide(out)


def step(x: Tensor, out: Tensor, noise: Tensor, tr: Transition) -> Tensor:
    """One step,  a x + b out + std z,  (B, C, H, W) -> (B, C, H, W) float32 or wider."""
    return mean(x, out, tr) + tr.std * wide(noise)


def log_prob(noise: Tensor, tr: Transition) -> Tensor:
    """Log-density of a drawn step, mean over the latent, (B, C, H, W) -> (B,); inf for a step without noise.

    DDPO (arXiv 2305.13301), each step a Gaussian policy:
    log N(x'; a x + b out, std^2) = -z^2 / 2 - log std - log(2 pi) / 2
    """
    if not tr.std:
        return noise.new_full((len(noise),), math.inf, dtype=torch.float32)
    return -(wide(noise).square() / 2).flatten(1).mean(1) - math.log(tr.std) - math.log(2 * math.pi) / 2


def _pairs(grid: Grid) -> list[tuple[float, float]]:
    """The T pairs (level, next level)."""
    levels = grid.levels.tolist()
    return list(pairwise(levels))


def _sigma(pair: tuple[float, float], eta: float, sigma: Sigma, target: float | None) -> float:
    return ddim_native_sigma(*pair, eta) if sigma == "native" else ddim_sigma(*pair, sigma, target)


def _check_method(grid: Grid, method: Method, noise_level: float) -> None:
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, but it must be one of {', '.join(METHODS)}.")
    if (method == "ddim") != (grid.kind == "ddim"):
        fits = "ddim" if grid.kind == "ddim" else "dance_sde, flow_sde or cps"
        raise ValueError(f"method is {method!r} on a {grid.kind} grid, but that grid takes {fits}. Change one of them.")
    highest = 1.0 if method in ("ddim", "cps") else math.inf
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
                f"target is {target}, but sigma = 'native' has no target. "
                "Use sigma = 'uniform' or 'paper', or no target."
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
