"""Objectives on the forward process: finished samples are noised again, and the loss compares predictions of them.

They need no trajectory and no stochastic sampler, only final latents, their advantages and the model that made them.
Throughout, d = out_new - out_old, and `error` is how far the old model's prediction was off, out_old - target.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from comfyui_pcpo.method.surrogate import OBJECTIVES, SurrogateLoss, never_clipped, ppo, ppo_clipped
from comfyui_pcpo.method.transition import wide

if TYPE_CHECKING:  # the configuration reads this module's names without loading torch
    from torch import Tensor

    from comfyui_pcpo.method.schedule import Grid, Kind


def scales(grid: Grid) -> list[tuple[float, float]]:
    """(signal, noise) at the start of each step, x_t = signal x0 + noise eps: (1 - t, t), or the roots of alpha_bar."""
    levels = grid.levels[:-1].tolist()
    if grid.kind == "flow":
        return [(1 - t, t) for t in levels]
    return [(math.sqrt(ab), math.sqrt(1 - ab)) for ab in levels]


def noised(x0: Tensor, eps: Tensor, scale: tuple[float, float]) -> Tensor:
    """x_t = signal x0 + noise eps, (B, C, H, W) -> (B, C, H, W) float32 or wider."""
    signal, noise = scale
    return signal * wide(x0) + noise * wide(eps)


def target(x0: Tensor, eps: Tensor, kind: Kind) -> Tensor:
    """Output of a perfect model at x_t, (B, C, H, W) -> (B, C, H, W): the velocity eps - x0 of flow, or eps."""
    return wide(eps) - wide(x0) if kind == "flow" else wide(eps)


def predicted_x0(x: Tensor, out: Tensor, scale: tuple[float, float], kind: Kind) -> Tensor:
    """The clean latent that an output predicts, (B, C, H, W) -> (B, C, H, W) float32 or wider.

    x0 = x_t - t v of flow,  x0 = (x_t - noise eps) / signal of epsilon models
    """
    signal, noise = scale
    return wide(x) - noise * wide(out) if kind == "flow" else (wide(x) - noise * wide(out)) / signal


def image_scale(scale: tuple[float, float], kind: Kind) -> float:
    """k of  x0_predicted - x0 = -k (out - target):  t for a velocity, sqrt(1 - ab) / sqrt(ab) for epsilon."""
    signal, noise = scale
    return noise if kind == "flow" else noise / signal


def matching_log_ratio(d: Tensor, error: Tensor) -> Tensor:
    """Log-ratio of a finished sample, from the errors of its prediction, (B, C, H, W) -> (B,).

    AWM (arXiv 2509.25050), its code's uniform weight:  log p = -|out - target|^2, so
    log rho = |e|^2 - |e + d|^2 = -(2 <d, e> + |d|^2),  means over the latent
    """
    d = wide(d)
    return -(d * (2 * wide(error) + d)).flatten(1).mean(1)


def adaptive_weight(error: Tensor) -> Tensor:
    """Factor that puts samples and levels on one scale,  1 / mean |e|,  without gradient, (B, C, H, W) -> (B,).

    V-GRPO (arXiv 2604.23380) weights its likelihood surrogate adaptively; its exact factor could not be looked up.
    This is the factor of DiffusionNFT's code, taken of the old model's error e, so that the log-ratio of an unchanged
    model stays 0.
    """
    return 1 / wide(error.detach()).abs().flatten(1).mean(1).clamp(min=1e-5)


def adaptive_log_ratio(d: Tensor, error: Tensor) -> Tensor:
    """AWM's log-ratio times its adaptive weight,  (|e|^2 - |e + d|^2) / mean |e|,  (B, C, H, W) -> (B,)."""
    return adaptive_weight(error) * matching_log_ratio(d, error)


# how a finished sample's log-ratio is weighted: (d, error) -> (B,)
LIKELIHOODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "uniform": matching_log_ratio,
    "adaptive": adaptive_log_ratio,
}


def nft(d: Tensor, error: Tensor, advantage: Tensor, k: float, bound: float = 5.0, beta: float = 1.0) -> Tensor:
    """DiffusionNFT's loss of a finished sample, (B, C, H, W), (B, C, H, W), (B,) -> (B,).

    DiffusionNFT (arXiv 2509.16117), the policy loss with the weights and scale of its code:
    bound / beta (r |x0+ - x0|^2 / w+ + (1 - r) |x0- - x0|^2 / w-),  r = 1/2 + A / (2 bound) within [0, 1],
    out+- = out_old +- beta d,  so  x0+- - x0 = -k (e +- beta d);  w+- = mean |x0+- - x0|, without gradient
    """
    if not (beta > 0 and bound > 0):
        raise ValueError(f"beta is {beta} and bound {bound}, but both are positive. Use beta 1 (or 0.1) and bound 5.")
    d, error = wide(d), wide(error)
    r = (0.5 + wide(advantage) / (2 * bound)).clamp(0, 1)
    closer, further = (_normalised(k * (error + sign * beta * d)) for sign in (1, -1))
    return bound / beta * (r * closer + (1 - r) * further)


@dataclass(frozen=True)
class ForwardSettings:
    """Constants of a run's forward-process objective."""

    xi: float  # clip range (awm)
    bound: float = 5.0  # advantage clip (nft)
    beta: float = 1.0  # nft's beta
    likelihood: str = "uniform"  # weight of the log-ratio (awm)


@dataclass(frozen=True)
class ForwardLoss:
    """An objective on the forward process: its loss, and where that is flat by design."""

    loss: Callable[[Tensor, Tensor, Tensor, float, ForwardSettings], Tensor]  # (d, error, advantage, k, settings)
    clipped: Callable[[Tensor, Tensor, float], Tensor]  # (log-ratio, advantage, xi) -> (B,) bool
    ignores: frozenset[str] = frozenset()  # settings of the objective without effect on it
    replays_steps: bool = False  # trains finished samples at fresh noise


# settings that only objectives on the trajectory read
TRAJECTORY_ONLY = frozenset(("credit", "form", "kl_mask", "loss_weight", "rescale_credit"))

FORWARD_OBJECTIVES: dict[str, ForwardLoss] = {
    "awm": ForwardLoss(
        lambda d, error, a, k, s: ppo(LIKELIHOODS[s.likelihood](d, error), a, s.xi),
        ppo_clipped,
        TRAJECTORY_ONLY | {"nft_beta"},
    ),
    "nft": ForwardLoss(
        lambda d, error, a, k, s: nft(d, error, a, k, s.bound, s.beta),
        never_clipped,
        TRAJECTORY_ONLY | {"clip_range", "likelihood"},
    ),
}
ALL_OBJECTIVES: dict[str, SurrogateLoss | ForwardLoss] = {**OBJECTIVES, **FORWARD_OBJECTIVES}


def _normalised(x: Tensor) -> Tensor:
    """Mean square over mean size, the latter without gradient, (B, C, H, W) -> (B,)."""
    x = x.flatten(1)
    return x.square().mean(1) / x.detach().abs().mean(1).clamp(min=1e-5)


def output_distance(d_ref: Tensor) -> Tensor:
    """How far an output is from the reference's, |d_ref|^2, mean over the latent, (B, C, H, W) -> (B,).

    AWM's and DiffusionNFT's regulariser, where the steps need not have noise and so may have no KL.
    """
    return wide(d_ref).square().flatten(1).mean(1)
