"""Linear mixed-effects model with a random intercept per block."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

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


def fit_mixed_model(rows: Sequence[tuple[str, Hashable, float]], reference: str) -> MixedModel:
    """REML fit of  y = method + block + noise,  block ~ N(0, s_b^2);  rows are (method, block, y).

    Laird and Ware 1982. A block is one seed of one task: its prompts and its noise are the same for all methods.
    The ratio s_b^2 / s^2 is searched on a fine grid. Intervals are Student's t with n - methods - blocks + 1 degrees
    of freedom, and NaN if that leaves none.
    """
    names = [reference, *sorted({name for name, _, _ in rows} - {reference})]
    blocks = sorted({block for _, block, _ in rows}, key=str)
    y = np.array([value for _, _, value in rows])
    x = np.array([[1.0, *(name == other for other in names[1:])] for name, _, _ in rows])
    z = np.array([[block == other for other in blocks] for _, block, _ in rows], float)
    freedom = len(rows) - len(names) - len(blocks) + 1
    if freedom < 1:
        beta = np.linalg.lstsq(x, y, rcond=None)[0]
        point = {n: Interval(float(beta[k]), math.nan, math.nan) for k, n in enumerate(names) if n != reference}
        return MixedModel(point, dict.fromkeys(point, math.nan), math.nan, math.nan)
    ratio = max((0.0, *np.geomspace(1e-4, 1e4, 400)), key=lambda r: _likelihood(x, y, z, r)[0])
    _, beta, covariance, variance = _likelihood(x, y, z, ratio)
    errors = np.sqrt(np.diag(covariance))
    reach = stats.t.ppf(0.975, freedom) * errors
    effects = {n: Interval(*map(float, (beta[k], beta[k] - reach[k], beta[k] + reach[k]))) for k, n in enumerate(names)}
    p = {n: float(2 * stats.t.sf(abs(beta[k]) / errors[k], freedom)) for k, n in enumerate(names)}
    for by_method in (effects, p):
        del by_method[reference]
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
