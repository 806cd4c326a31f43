"""Paired t-test of before against after over seeds, with means and standard errors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

SAME = 1e-9  # a spread that is smaller than this share of the values is rounding


@dataclass(frozen=True)
class Estimate:
    """Mean of the finite values and its standard error, NaN where fewer than 2 are finite."""

    mean: float
    error: float
    count: int


@dataclass(frozen=True)
class Paired:
    """after - before, and the two-sided p-value of the paired t-test; p is NaN where it is undefined."""

    difference: Estimate
    t: float
    p: float


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of the mean, std / sqrt(n)."""
    finite = [v for v in values if math.isfinite(v)]
    mean = fmean(finite) if finite else math.nan
    error = stdev(finite) / math.sqrt(len(finite)) if len(finite) > 1 else math.nan
    return Estimate(mean, error, len(finite))


def paired(before: Sequence[float], after: Sequence[float]) -> Paired:
    """Student's t-test on the differences of pairs; pairs with a NaN are dropped.

    t = mean(d) / (std(d) / sqrt(n)),  n - 1 degrees of freedom
    """
    if len(before) != len(after):
        raise ValueError(
            f"There are {len(before)} values before and {len(after)} after, but the test needs pairs. "
            "Give one of each per seed."
        )
    difference = estimate([b - a for a, b in zip(before, after, strict=True)])
    rounding = SAME * max((abs(v) for v in (*before, *after) if math.isfinite(v)), default=0.0)
    if not difference.error > rounding:  # one seed, or differences without spread
        return Paired(difference, math.nan, math.nan)
    t = difference.mean / difference.error
    return Paired(difference, t, student(t, difference.count - 1))


def student(t: float, dof: int) -> float:
    """Two-sided p-value of Student's t for an integer number of degrees of freedom.

    Abramowitz and Stegun 26.7.3 and 26.7.4, with theta = atan(t / sqrt(dof))
    """
    theta = math.atan(abs(t) / math.sqrt(dof))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = dof % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(2 + odd, dof + 1, 2):
        total += term
        term *= (k - 1) / k * cosine * cosine
    inside = 2 / math.pi * (theta + sine * total) if odd else sine * total
    return max(0.0, 1 - inside)
