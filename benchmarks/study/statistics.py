"""Few, standard statistics: time to a target, limits by t and bootstrap, one mixed-effects model, Holm."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 10_000


def first_reach(updates: Sequence[float], values: Sequence[float], goal: float) -> float:
    """When a curve first reaches `goal`, straight lines between its points; infinity where it never does."""
    previous = None
    for at, value in zip(updates, values, strict=True):
        if value >= goal:
            if previous is None:
                return float(at)
            x, y = previous
            return float(x + (at - x) * (goal - y) / (value - y))
        previous = (at, value)
    return math.inf


def at_reach(updates: Sequence[float], values: Sequence[float], goal: float, others: Sequence[float]) -> float:
    """Another curve's value at the moment when the first one reaches `goal`; NaN where it never does."""
    when = first_reach(updates, values, goal)
    return float(np.interp(when, updates, others)) if math.isfinite(when) else math.nan


def area(updates: Sequence[float], values: Sequence[float]) -> float:
    """Mean height of a curve, trapezoids between its points: early gains count longer than late ones."""
    x, y = np.asarray(updates, float), np.asarray(values, float)
    return float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum() / (x[-1] - x[0]))


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % limits."""

    value: float
    low: float
    high: float


def median(values: np.ndarray) -> np.ndarray:
    """Lower median along the last axis: infinities (a target never reached) stay where they belong."""
    return np.sort(values, axis=-1)[..., (values.shape[-1] - 1) // 2]


def t_limits(values: Sequence[float]) -> Interval:
    """Mean with Student's t limits (1908); NaN limits for fewer than two values."""
    x = np.asarray(values, float)
    if len(x) < 2:
        return Interval(float(x[0]) if len(x) else math.nan, math.nan, math.nan)
    reach = float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    middle = float(x.mean())
    return Interval(middle, middle - reach, middle + reach)


def spread(values: Sequence[float]) -> Interval:
    """Mean with the smallest and the largest value, where values are too few for limits."""
    x = np.asarray(values, float)
    return Interval(float(x.mean()), float(x.min()), float(x.max()))


def t_test(differences: Sequence[float]) -> float:
    """Two-sided p of a mean of 0 by Student's t; NaN for fewer than two differences, 1 where all are 0."""
    d = np.asarray(differences, float)
    if len(d) < 2:
        return math.nan
    error = d.std(ddof=1) / math.sqrt(len(d))
    if error == 0:
        return float(d.mean() == 0)
    return float(2 * stats.t.sf(abs(d.mean()) / error, len(d) - 1))


def bootstrap(values: Sequence[float], statistic: Callable[[np.ndarray], np.ndarray], seed: int = 0) -> Interval:
    """Percentile bootstrap over seeds (Efron 1979), for what has no formula; with five seeds it is narrow."""
    x = np.asarray(values, float)
    if len(x) < 2:
        return Interval(float(x[0]) if len(x) else math.nan, math.nan, math.nan)
    draws = x[np.random.default_rng(seed).integers(0, len(x), (RESAMPLES, len(x)))]
    low, high = np.quantile(statistic(draws), (0.025, 0.975), method="nearest")
    return Interval(float(statistic(x)), float(low), float(high))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979), in the order given; NaN stays and does not count."""
    known = [i for i in np.argsort(p_values) if not math.isnan(p_values[i])]
    adjusted, highest = np.full(len(p_values), math.nan), 0.0
    for rank, i in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted.tolist()


@dataclass(frozen=True)
class Mixed:
    """A fitted random-intercept model: one effect per contender against the first one."""

    effects: dict[str, Interval]
    p: dict[str, float]
    block_std: float
    residual_std: float


def mixed(rows: Sequence[tuple[str, Hashable, float]], reference: str) -> Mixed:
    """REML fit of  y = contender + block + noise,  block ~ N(0, s_b^2);  rows are (contender, block, y).

    Laird and Ware 1982. A block is one seed of one task: all contenders see its prompts and its noise.
    The ratio s_b^2 / s^2 is found on a fine grid; limits are Student's t with n - contenders - blocks + 1 degrees, and
    NaN where that leaves none.
    """
    names = [reference, *sorted({name for name, _, _ in rows} - {reference})]
    blocks = sorted({block for _, block, _ in rows}, key=str)
    y = np.array([value for _, _, value in rows])
    x = np.zeros((len(rows), len(names)))
    x[:, 0] = 1
    z = np.zeros((len(rows), len(blocks)))
    for i, (name, block, _) in enumerate(rows):
        if name != reference:
            x[i, names.index(name)] = 1
        z[i, blocks.index(block)] = 1
    freedom = len(rows) - len(names) - len(blocks) + 1
    if freedom < 1:
        beta = np.linalg.lstsq(x, y, rcond=None)[0]
        point = {n: Interval(float(beta[k]), math.nan, math.nan) for k, n in enumerate(names) if n != reference}
        return Mixed(point, dict.fromkeys(point, math.nan), math.nan, math.nan)
    ratio = max((0.0, *np.geomspace(1e-4, 1e4, 400)), key=lambda r: _likelihood(x, y, z, r)[0])
    _, beta, covariance, variance = _likelihood(x, y, z, ratio)
    errors = np.sqrt(np.diag(covariance))
    reach = stats.t.ppf(0.975, freedom) * errors
    effects = {n: Interval(*map(float, (beta[k], beta[k] - reach[k], beta[k] + reach[k]))) for k, n in enumerate(names)}
    p = {n: float(2 * stats.t.sf(abs(beta[k]) / errors[k], freedom)) for k, n in enumerate(names)}
    for found in (effects, p):
        del found[reference]
    return Mixed(effects, p, math.sqrt(ratio * variance), math.sqrt(variance))


def _likelihood(
    x: np.ndarray, y: np.ndarray, z: np.ndarray, ratio: float
) -> tuple[float, np.ndarray, np.ndarray, float]:
    """(restricted log-likelihood, effects, their covariance, residual variance) at a ratio of variances."""
    v = np.eye(len(y)) + ratio * z @ z.T
    inverse = np.linalg.inv(v)
    information = x.T @ inverse @ x
    beta = np.linalg.solve(information, x.T @ inverse @ y)
    residual = y - x @ beta
    freedom = len(y) - x.shape[1]
    variance = float(residual @ inverse @ residual / freedom)
    logs = np.linalg.slogdet(v)[1] + np.linalg.slogdet(information)[1] + freedom * math.log(max(variance, 1e-300))
    return -0.5 * logs, beta, variance * np.linalg.inv(information), variance
