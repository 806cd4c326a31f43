"""The exact-KL mask, an alternative to the clip: a step's divergence is computed, not estimated from its ratio."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfyui_pcpo.method.transition import wide

if TYPE_CHECKING:  # the configuration reads this module's names without loading torch
    from torch import Tensor


def kl_mask(divergence: Tensor, log_ratio: Tensor, advantage: Tensor, bound: float) -> Tensor:
    """Terms to drop, all arguments (B,), -> (B,) bool without gradient.

    Flow-DPPO (arXiv 2606.11025):  KL(new || old) >= bound, and the gradient points outward:
    A > 0 and rho > 1, or A < 0 and rho < 1.  KL = w^2 |d|^2 / 2 (`surrogate.kl`), w the native weight
    """
    if not bound > 0:
        raise ValueError(f"the KL bound is {bound}, but it must be positive. Use 1e-5 (Flow-DPPO) or more.")
    outward = wide(advantage) * wide(log_ratio.detach()) > 0
    return (divergence.detach() >= bound) & outward


def kl_masked(values: Tensor, masked: Tensor) -> Tensor:
    """Losses or log-ratios with the masked ones at 0 and without gradient, (B,), (B,) bool -> (B,)."""
    return values.masked_fill(masked, 0.0)
