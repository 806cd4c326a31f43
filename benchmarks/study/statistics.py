"""Standard statistics: time to a target, t and bootstrap intervals, t-test, Holm's correction."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 10_000
LEAST_VALUES = 3  # values of an interval; that of two is 25 times as wide as their standard error


def first_reach(updates: Sequence[float], values: Sequence[float], goal: float) -> float:
    """Where a curve first reaches `goal`, by linear interpolation; infinity if it never does."""
    previous = None
    for at, value in zip(updates, values, strict=True):
        if value >= goal:
            if previous is None:
                return float(at)
            x, y = previous
            return float(x + (at - x) * (goal - y) / (value - y))
        previous = (at, value)
    return math.inf


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval, or with the range of a small sample."""

    value: float
    low: float
    high: float


def median(values: np.ndarray) -> np.ndarray:
    """Upper median along the last axis; unlike an interpolated one, it allows infinities (target never reached)."""
    return np.sort(values, axis=-1)[..., values.shape[-1] // 2]


def t_interval(values: Sequence[float]) -> Interval:
    """Mean with Student's t interval (1908); NaN limits for fewer than LEAST_VALUES values."""
    x = np.asarray(values, float)
    if len(x) < LEAST_VALUES:
        return Interval(float(x.mean()) if len(x) else math.nan, math.nan, math.nan)
    reach = float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    middle = float(x.mean())
    return Interval(middle, middle - reach, middle + reach)


def value_range(values: Sequence[float]) -> Interval:
    """Mean with the smallest and the largest value, for samples too small for an interval."""
    x = np.asarray(values, float)
    return Interval(float(x.mean()), float(x.min()), float(x.max()))


def t_test(differences: Sequence[float]) -> float:
    """Two-sided p-value of a zero mean by Student's t; NaN for fewer than two differences, 1 if all are 0."""
    d = np.asarray(differences, float)
    if len(d) < 2:
        return math.nan
    error = d.std(ddof=1) / math.sqrt(len(d))
    if error == 0:
        return float(d.mean() == 0)
    return float(2 * stats.t.sf(abs(d.mean()) / error, len(d) - 1))


def bootstrap(values: Sequence[float], statistic: Callable[[np.ndarray], np.ndarray], seed: int = 0) -> Interval:
    """Percentile bootstrap over seeds (Efron 1979), for statistics without a formula; too narrow with five seeds."""
    x = np.asarray(values, float)
    if len(x) < LEAST_VALUES:
        return Interval(float(statistic(x)) if len(x) else math.nan, math.nan, math.nan)
    draws = x[np.random.default_rng(seed).integers(0, len(x), (RESAMPLES, len(x)))]
    low, high = np.quantile(statistic(draws), (0.025, 0.975), method="nearest")
    return Interval(float(statistic(x)), float(low), float(high))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for multiple tests (Holm 1979), in the given order; NaN is kept and not counted."""
    known = [i for i in np.argsort(p_values) if not math.isnan(p_values[i])]
    adjusted, highest = np.full(len(p_values), math.nan), 0.0
    for rank, i in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted.tolist()
