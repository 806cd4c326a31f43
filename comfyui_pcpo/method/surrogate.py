"""The surrogate objective of a step: log-ratio under credit, ppo, log_hinge, matching, clipping and KL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from comfyui_pcpo.method.transition import Transition, wide

if TYPE_CHECKING:  # the configuration reads this module's names without loading torch
    from torch import Tensor

Form = str
FAR = 80.0
"""A log-ratio beyond every clip range, whose exponential is finite in float32."""
Weight: TypeAlias = "float | Tensor"


def log_ratio(d: Tensor, noise: Tensor, weight: Weight) -> Tensor:
    """Log-ratio of a step under credit `weight`, d = out_new - out_old, (B, C, H, W) -> (B,).

    PCPO (arXiv 2509.25774), Proposition 1:  log rho = -(w <d, z> + w^2 |d|^2 / 2),  means over the latent
    """
    u = _column(weight, d) * wide(d)
    return -(u * wide(noise) + 0.5 * u.square()).flatten(1).mean(1)


def log_ratio_linear(d: Tensor, noise: Tensor, weight: Weight) -> Tensor:
    """Log-ratio without its square term, (B, C, H, W) -> (B,).

    PCPO, the authors' code:  log rho = -w <d, z>;  removes the negative bias -w^2 |d|^2 / 2
    """
    return -(_column(weight, d) * wide(d) * wide(noise)).flatten(1).mean(1)


def log_ratio_scaled(d: Tensor, noise: Tensor, weight: Weight, native: Weight) -> Tensor:
    """The native log-ratio times the credit factor, (B, C, H, W) -> (B,).

    PCPO, the authors' PPO form:  k log rho,  k = w~ / w
    """
    return _per_image(weight, d) / _per_image(native, d) * log_ratio(d, noise, native)


# each: (d, noise, target weight, native weight) -> (B,)
FORMS: dict[Form, Callable[[Tensor, Tensor, Weight, Weight], Tensor]] = {
    "exact": lambda d, noise, weight, native: log_ratio(d, noise, weight),
    "scale": log_ratio_scaled,
    "linear": lambda d, noise, weight, native: log_ratio_linear(d, noise, weight),
}


def ppo(log_ratio: Tensor, advantage: Tensor, xi: float) -> Tensor:
    """The clipped surrogate, (B,), (B,) -> (B,).

    PPO (arXiv 1707.06347), Equation 7:  max(-A rho, -A clip(rho, 1 - xi, 1 + xi))
    """
    log_ratio, advantage = wide(log_ratio), wide(advantage)
    rho = log_ratio.where(advantage < 0, log_ratio.clamp(max=FAR)).exp()  # inf beyond the clip has a gradient of NaN
    return (-advantage * rho).maximum(-advantage * rho.clamp(1 - xi, 1 + xi))


def log_hinge(log_ratio: Tensor, advantage: Tensor, xi: float) -> Tensor:
    """The hinge on the log-ratio, (B,), (B,) -> (B,).

    PCPO (arXiv 2509.25774), log-hinge:  max(0, xi |A| - A log rho);  its gradient equals ppo's to first order
    """
    return matching(log_ratio, advantage, xi).clamp(min=0)


def matching(log_ratio: Tensor, advantage: Tensor, xi: float) -> Tensor:
    """The hinge without its clip, (B,), (B,) -> (B,).

    PCPO, unclipped:  xi |A| - A log rho
    """
    advantage = wide(advantage)
    return xi * advantage.abs() - advantage * wide(log_ratio)


def importance_weighted(log_ratio: Tensor, advantage: Tensor, xi: float = 0.0) -> Tensor:
    """ppo without its clip,  -A rho,  (B,), (B,) -> (B,)."""
    return -wide(advantage) * wide(log_ratio).exp()


def ppo_clipped(log_ratio: Tensor, advantage: Tensor, xi: float) -> Tensor:
    """ppo's flat region,  A > 0 and rho > 1 + xi, or A < 0 and rho < 1 - xi,  (B,), (B,) -> (B,) bool."""
    rho = wide(log_ratio).exp()
    return ((advantage > 0) & (rho > 1 + xi)) | ((advantage < 0) & (rho < 1 - xi))


def log_hinge_clipped(log_ratio: Tensor, advantage: Tensor, xi: float) -> Tensor:
    """log_hinge's flat region,  sign(A) log rho > xi,  (B,), (B,) -> (B,) bool."""
    return matching(log_ratio, advantage, xi) < 0


def never_clipped(log_ratio: Tensor, advantage: Tensor, xi: float) -> Tensor:
    """No flat region, (B,), (B,) -> (B,) bool."""
    return log_ratio.new_zeros(len(log_ratio)).bool()


# settings that only objectives on the forward process read
FORWARD_ONLY = frozenset(("nft_beta", "shared_noise", "level_credit", "likelihood"))


@dataclass(frozen=True)
class SurrogateLoss:
    """An objective on the trajectory; both functions are of (log-ratio (B,), advantage (B,), xi)."""

    loss: Callable[[Tensor, Tensor, float], Tensor]  # -> (B,)
    clipped: Callable[[Tensor, Tensor, float], Tensor]  # -> (B,) bool, where the loss is flat by design
    unclipped: Callable[[Tensor, Tensor, float], Tensor] = importance_weighted  # where a KL mask replaces the clip
    ignores: frozenset[str] = FORWARD_ONLY  # settings of the objective without effect on it
    replays_steps: bool = True  # trains the denoising steps as they were sampled, which need noise


OBJECTIVES: dict[str, SurrogateLoss] = {
    "log_hinge": SurrogateLoss(log_hinge, log_hinge_clipped, matching),
    "ppo": SurrogateLoss(ppo, ppo_clipped, importance_weighted),
    "matching": SurrogateLoss(matching, never_clipped, matching, FORWARD_ONLY | {"clip_range"}),
}


def is_clipped(log_ratio: Tensor, advantage: Tensor, xi: float, objective: str) -> Tensor:
    """Whether a term lies strictly inside its flat region, where it has no gradient, (B,), (B,) -> (B,) bool.

    An advantage of 0 trains nothing anyway and does not count as clipped.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective is {objective!r}, but it must be one of {', '.join(OBJECTIVES)}.")
    return OBJECTIVES[objective].clipped(log_ratio.detach(), advantage, xi)


def taylor_error(log_ratio: Tensor) -> Tensor:
    """How far the ratio is from first order,  |log rho - (rho - 1)|,  (B,) -> (B,)."""
    log_rho = wide(log_ratio)
    return (log_rho - log_rho.expm1()).abs()


def kl(d_ref: Tensor, transition: Transition) -> Tensor:
    """KL of a step to the reference, d_ref = out - out_ref, (B, C, H, W) -> (B,).

    DPOK (arXiv 2305.16381), exact for two Gaussians of one std:  |mean - mean_ref|^2 / (2 s^2) = w^2 |d_ref|^2 / 2,
    mean over the latent
    """
    if transition.std == 0:
        raise ValueError("std is 0, but the KL of a step needs noise. Leave this step out of the trained steps.")
    return 0.5 * (transition.weight * wide(d_ref)).square().flatten(1).mean(1)


def _per_image(weight: Weight, d: Tensor) -> Weight:
    """A float as it is; a tensor of weights as (B,) on the device and in the width of `d`."""
    if isinstance(weight, float | int):
        return weight
    if weight.shape not in ((), d.shape[:1]):
        raise ValueError(f"weight has shape {tuple(weight.shape)}, but it is a number or one per image, ({len(d)},).")
    return weight.to(d.device, wide(d).dtype)


def _column(weight: Weight, d: Tensor) -> Weight:
    """`weight` ready to multiply (B, C, H, W): a float, or (B, 1, 1, 1)."""
    weight = _per_image(weight, d)
    return weight if isinstance(weight, float | int) else weight.reshape(-1, *[1] * (d.ndim - 1))
