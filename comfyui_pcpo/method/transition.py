"""One Gaussian denoising step x' = a x + b out + std z: ddim, dance_sde, flow_sde and cps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the configuration reads the samplers' names without loading torch
    from torch import Tensor


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


def flow_sde(t: float, t_next: float, noise_level: float) -> Transition:
    """The reverse SDE step with diffusion g = noise_level sqrt(t / (1 - t)), out = v.

    Flow-GRPO (arXiv 2505.05470):  x' = x - v dt - g^2 / (2 t) (x + (1 - t) v) dt + g sqrt(dt) z
    At t = 1 the 1 - t inside g, and only that one, becomes 1 - t': the code's sigma_max.
    """
    dt = t - t_next
    g2 = noise_level**2 * t / (1 - (t if t < 1 - 1e-6 else t_next))
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


def wide(x: Tensor) -> Tensor:
    """`x` in float32 or wider: ratios and latents do not survive fp16 and bf16."""
    return x if x.is_floating_point() and x.element_size() >= 4 else x.float()


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
        return wide(noise).new_full((len(noise),), math.inf)
    return -(wide(noise).square() / 2).flatten(1).mean(1) - math.log(tr.std) - math.log(2 * math.pi) / 2
