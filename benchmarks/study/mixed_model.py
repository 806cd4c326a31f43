"""Linear mixed-effects model with a random intercept per block."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

from .statistics import Interval


@dataclass(frozen=True)
class MixedModel:
    """A fitted random-intercept model: the effect of each method relative to the reference."""

    effects: dict[str, Interval]
    p: dict[str, float]
    block_std: float
    residual_std: float


class Observation(NamedTuple):
    """The outcome of one run."""

    method: str
    task: str
    seed: int
    value: float


def fit_mixed_model(rows: Sequence[Observation], reference: str) -> MixedModel:
    """REML fit of  value = method + task + block + noise,  block ~ N(0, s_b^2).

    Laird and Ware 1982. A block is one seed of one task: its prompts and its noise are the same for all methods. With
    an effect of each task, a method that exists in some tasks only is not credited with how easy those are. The ratio
    s_b^2 / s^2 is searched on a fine grid: it may be near 0, where statsmodels 0.15 does not converge. Intervals are
    Student's t with n - methods - blocks + 1 degrees of freedom, and NaN if that leaves none. All effects are NaN
    while a method shares no task with the others.
    """
    methods = [reference, *sorted({row.method for row in rows} - {reference})]
    tasks, blocks = sorted({row.task for row in rows}), sorted({(row.task, row.seed) for row in rows})
    y = np.array([row.value for row in rows])
    other_methods = [[row.method == name for name in methods[1:]] for row in rows]
    other_tasks = [[row.task == name for name in tasks[1:]] for row in rows]
    x = np.hstack([np.ones((len(rows), 1)), np.array(other_methods, float), np.array(other_tasks, float)])
    z = np.array([[(row.task, row.seed) == block for block in blocks] for row in rows], float)
    named = dict(enumerate(methods[1:], 1))  # column of x -> method
    freedom = len(rows) - len(methods) - len(blocks) + 1
    if np.linalg.matrix_rank(x) < x.shape[1]:  # a method shares no task with the others
        return MixedModel(
            {name: Interval(math.nan, math.nan, math.nan) for name in named.values()},
            dict.fromkeys(named.values(), math.nan),
            math.nan,
            math.nan,
        )
    if freedom < 1:
        beta = np.linalg.lstsq(x, y, rcond=None)[0]
        point = {name: Interval(float(beta[k]), math.nan, math.nan) for k, name in named.items()}
        return MixedModel(point, dict.fromkeys(point, math.nan), math.nan, math.nan)
    ratio = max((0.0, *np.geomspace(1e-4, 1e4, 400)), key=lambda r: _likelihood(x, y, z, r)[0])
    _, beta, covariance, variance = _likelihood(x, y, z, ratio)
    errors = np.sqrt(np.diag(covariance))
    reach = stats.t.ppf(0.975, freedom) * errors
    effects = {
        name: Interval(*map(float, (beta[k], beta[k] - reach[k], beta[k] + reach[k]))) for k, name in named.items()
    }
    p = {name: float(2 * stats.t.sf(abs(beta[k]) / errors[k], freedom)) for k, name in named.items()}
    return MixedModel(effects, p, math.sqrt(ratio * variance), math.sqrt(variance))


def _likelihood(
    x: np.ndarray, y: np.ndarray, z: np.ndarray, ratio: float
) -> tuple[float, np.ndarray, np.ndarray, float]:
    """(restricted log-likelihood, effects, their covariance, residual variance) at a given ratio of variances."""
    v = np.eye(len(y)) + ratio * z @ z.T
    inverse = np.linalg.inv(v)
    information = x.T @ inverse @ x
    beta = np.linalg.solve(information, x.T @ inverse @ y)
    residual = y - x @ beta
    freedom = len(y) - x.shape[1]
    variance = float(residual @ inverse @ residual / freedom)
    logs = np.linalg.slogdet(v)[1] + np.linalg.slogdet(information)[1] + freedom * math.log(max(variance, 1e-300))
    return -0.5 * logs, beta, variance * np.linalg.inv(information), variance
