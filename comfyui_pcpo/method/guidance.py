"""Implicit reward guidance: compose aligned models at inference, at one noise level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from comfyui_pcpo.method.transition import Transition, wide


@dataclass(frozen=True)
class ImplicitReward:
    """One aligned model's share: lambda = `weight` while the run's progress in [0, 1] is in [start, end)."""

    weight: float
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(
                f"the window is {self.start} to {self.end}, but it must satisfy 0 <= start < end <= 1. "
                "Use 0 and 1 for the whole run."
            )

    def weight_at(self, progress: float) -> float:
        """lambda at `progress`, 0 at the first step and 1 at the image; end = 1 includes the image."""
        inside = self.start <= progress and (progress < self.end or self.end == 1)
        return self.weight if inside else 0.0


def irg(out_base: Tensor, outs: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Base prediction guided by K aligned models, (B, C, H, W) -> (B, C, H, W), in the base's dtype.

    RLG (arXiv 2508.21016), for K rewards:  out = out_base + sum_k lambda_k (out_k - out_base)
    All weights 0 is the base and a lone weight of 1 that model, bit for bit.
    """
    if len(outs) != len(weights):
        raise ValueError(f"there are {len(weights)} weights for {len(outs)} aligned models. Give one weight per model.")
    active = [(out, weight) for out, weight in zip(outs, weights, strict=True) if weight != 0]
    if not active:
        return out_base
    if len(active) == 1 and active[0][1] == 1:
        return active[0][0].to(out_base.dtype)
    base = wide(out_base)
    total = base.clone()
    for out, weight in active:
        total += weight * (wide(out) - base)
    return total.to(out_base.dtype)


def cfg(out_uncond: Tensor, out_cond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, (B, C, H, W) -> (B, C, H, W); scale 1 is the conditional, bit for bit.

    CFG (arXiv 2207.12598), Equation 6, with scale = 1 + w:  uncond + scale (cond - uncond)
    """
    if scale == 1:
        return out_cond
    uncond = wide(out_uncond)
    return (uncond + scale * (wide(out_cond) - uncond)).to(out_cond.dtype)


def proportionate_schedule(transitions: Sequence[Transition], target: float) -> list[float]:
    """The lambda of every step under proportionate credit, T numbers; 0 on a step without noise.

    PCPO's credit read as guidance:  lambda_t = w* / w_native(t)
    """
    if not target > 0:
        raise ValueError(
            f"target is {target}, but it is a positive weight. Use the mean native weight of the trained steps."
        )
    return [target / tr.weight for tr in transitions]
