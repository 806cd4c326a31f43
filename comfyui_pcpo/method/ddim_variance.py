"""Standard deviations of DDIM steps: the DDPM posterior's, or solved so that a step carries a wanted weight."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:  # the configuration reads this module's names without loading torch
    from comfyui_pcpo.method.schedule import Grid

Sigma = Literal["native", "paper", "uniform"]
SIGMAS: tuple[Sigma, ...] = get_args(Sigma)


def ddim_native_sigma(ab_t: float, ab_prev: float, eta: float) -> float:
    """Standard deviation of a DDIM step, eta times the DDPM posterior's.

    DDIM (arXiv 2010.02502), Equation 16:  sigma = eta sqrt((1 - ab') / (1 - ab)) sqrt(1 - ab / ab')
    """
    return eta * math.sqrt((1 - ab_prev) / (1 - ab_t) * (1 - ab_t / ab_prev))


def ddim_smallest_target(ab_t: float, ab_prev: float) -> float:
    """The smallest weight that any sigma can give a DDIM step; 0 for a step that cannot have noise.

    From PCPO's sigma equation, real iff  w* >= w_min = sqrt(a^2 / b^2 - 1),  a^2 - b^2 = ab' / ab - 1,  b^2 = 1 - ab'.
    It is the native weight at eta = 1, so no sigma gives a step less weight than that.
    """
    return math.sqrt((ab_prev / ab_t - 1) / (1 - ab_prev)) if ab_prev < 1 else 0.0


def smallest_target(grid: Grid) -> float:
    """The smallest w* that every noisy step of a ddim grid can carry."""
    levels = grid.levels.tolist()
    return max(ddim_smallest_target(ab_t, ab_prev) for ab_t, ab_prev in pairwise(levels))


def ddim_sigma(ab_t: float, ab_prev: float, choice: Sigma, target: float | None = None) -> float:
    """Standard deviation of a DDIM step under one of three rules.

        native   DDPM posterior (eta = 1)
        uniform  minus root of s^2 (1 + w^2) - 2 a w s + a^2 - b^2 = 0: C / s = w* exactly, s small
        paper    plus root, near native; above w* = a / b it solves (a + sqrt(b^2 - s^2)) / s = w*, not C / s = w*

    PCPO (arXiv 2509.25774), DDIM variance; the authors' code takes the plus root at every step.
    A step to ab' = 1 cannot have noise: its sigma is 0 under each rule.
    """
    if choice not in SIGMAS:
        raise ValueError(f"sigma is {choice!r}, but it must be one of {', '.join(SIGMAS)}.")
    if choice == "native":
        return ddim_native_sigma(ab_t, ab_prev, 1.0)
    check_target(choice, target, ddim_smallest_target(ab_t, ab_prev), "this step")
    if target is None or ab_prev == 1:
        return 0.0
    a = math.sqrt((1 - ab_t) * ab_prev / ab_t)
    gap = ab_prev / ab_t - 1  # a^2 - b^2 without cancellation
    top = a * target + math.sqrt(max(0.0, target**2 * (1 - ab_prev) - gap))
    return top / (1 + target**2) if choice == "paper" else gap / top


def check_target(choice: Sigma, target: float | None, smallest: float, where: str) -> None:
    """Refuse a w* that is missing, or below the smallest one that `where` can carry."""
    if target is None or not target >= smallest * (1 - 1e-12) or not math.isfinite(target):
        enough = math.ceil(smallest * 1e4) / 1e4
        raise ValueError(
            f"target_weight is {target}, but sigma = {choice!r} solves C / sigma = w*, and {where} cannot carry a w* "
            f"below {enough:.4f}. Use target_weight = {enough:.4f} or more, or sigma = 'native'."
        )
