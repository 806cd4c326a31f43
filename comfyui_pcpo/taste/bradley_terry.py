"""Bradley-Terry with a linear utility: P(a is preferred to b) = sigmoid(<w, x_a - x_b>).

Bradley and Terry 1952, Rank Analysis of Incomplete Block Designs, equation 1, with log-strength <w, x>
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

STEPS, TOLERANCE = 50, 1e-9  # of Newton's method


@dataclass(frozen=True)
class Utility:
    """r(x) = <w, x>: `weight` (D,), and its covariance (D, D) by Laplace's approximation; both float64."""

    weight: Tensor
    covariance: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """(..., D) -> (...)."""
        return features.double() @ self.weight

    def information(self, features: Tensor) -> float:
        """Expected information in nats of ranking a group, (G, D); groups that tell most are asked first.

        The sum over pairs of log(1 + p (1 - p) v) / 2, with v the variance of the utility's difference: what one
        comparison tells about w if the posterior is normal (MacKay 1992, Information-Based Objective Functions).
        """
        first, second = torch.triu_indices(len(features), len(features), 1)
        difference = (features[first] - features[second]).double()
        p = torch.sigmoid(difference @ self.weight)
        variance = (difference @ self.covariance * difference).sum(1)
        return float(torch.log1p(p * (1 - p) * variance).sum() / 2)

    def expected_scores(self, features: Tensor) -> Tensor:
        """What a vote on a group would score in expectation (see votes.rank_scores), (G, D) -> (G,) in [-1, 1]."""
        r = self(features)
        share = 2 * torch.sigmoid(r[:, None] - r[None]) - 1
        return (share.sum(1) / max(len(r) - 1, 1)).float()


def newton(difference: Tensor, weight: Tensor, ridge: float) -> Tensor:
    """argmin_w  -sum_m c_m log sigmoid(<w, d_m>) + ridge |w|^2 / 2,  d (M, K), c (M,) -> (K,), float64.

    The objective is convex; full steps are halved until they descend.
    """
    w = torch.zeros(difference.shape[1], dtype=torch.float64)
    identity = torch.eye(len(w), dtype=torch.float64)

    def objective(w: Tensor) -> Tensor:
        return -(weight * F.logsigmoid(difference @ w)).sum() + ridge * w.square().sum() / 2

    for _ in range(STEPS):
        p = torch.sigmoid(difference @ w)
        gradient = ridge * w - difference.T @ (weight * (1 - p))
        hessian = difference.T @ (difference * (weight * p * (1 - p))[:, None]) + ridge * identity
        step = torch.linalg.solve(hessian, gradient)
        size = 1.0
        while objective(w - size * step) > objective(w) and size > 1e-6:
            size /= 2
        w = w - size * step
        if (step.abs() < TOLERANCE).all():
            break
    return w


@dataclass(frozen=True)
class Span:
    """The space that M differences span, where every fit to them lies: coordinates (M, K) and a basis (K, D)."""

    coordinates: Tensor
    basis: Tensor

    @classmethod
    def of(cls, difference: Tensor) -> "Span":
        """difference (M, D), float64."""
        u, s, v = torch.linalg.svd(difference, full_matrices=False)
        kept = s > s[0] * 1e-10
        return cls(u[:, kept] * s[kept], v[kept])

    def fit(self, weight: Tensor, ridge: float) -> Tensor:
        """`newton` with all features, weight (M,) -> (D,)."""
        return self.basis.T @ newton(self.coordinates, weight, ridge)


def fit_utility(difference: Tensor, weight: Tensor, ridge: float) -> Utility:
    """The fit with its covariance, the inverse Hessian, difference (M, D), weight (M,)."""
    difference = difference.double()
    w = Span.of(difference).fit(weight, ridge)
    p = torch.sigmoid(difference @ w)
    hessian = difference.T @ (difference * (weight * p * (1 - p))[:, None])
    hessian.diagonal().add_(ridge)
    return Utility(w, torch.cholesky_inverse(torch.linalg.cholesky(hessian)))
