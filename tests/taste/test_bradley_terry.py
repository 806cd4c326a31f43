"""The Bradley-Terry fit: against a general optimizer, and what it says about uncertainty."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from comfyui_pcpo.taste.bradley_terry import Span, Utility, fit_utility, newton


def example(seed: int = 0, count: int = 40, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    difference = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return difference, torch.rand(count, generator=generator, dtype=torch.float64)


def test_newton_finds_the_minimum_that_scipy_finds():
    difference, weight = example()
    d, c = difference.numpy(), weight.numpy()

    def objective(w: np.ndarray) -> float:
        return float((c * np.logaddexp(0, -d @ w)).sum() + 0.3 * (w @ w) / 2)

    expected = minimize(objective, np.zeros(6), method="BFGS", options={"gtol": 1e-10}).x
    np.testing.assert_allclose(newton(difference, weight, 0.3).numpy(), expected, atol=1e-6)


def test_separable_votes_do_not_diverge():
    w = newton(torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.ones(1, dtype=torch.float64), 1e-3)
    assert 3 < float(w[0]) < 7 and float(w[1]) == 0  # w exp(w) = 1000 at the minimum


def test_more_features_than_votes_gives_the_same_fit_in_the_space_of_the_differences():
    difference, weight = example(count=5, width=30)
    torch.testing.assert_close(Span.of(difference).fit(weight, 0.5), newton(difference, weight, 0.5))


def test_a_preference_is_recovered_from_noisy_votes():
    generator = torch.Generator().manual_seed(1)
    truth = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    difference = torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    flip = torch.rand(4000, generator=generator) > torch.sigmoid(difference @ truth)
    difference[flip] *= -1
    utility = fit_utility(difference, torch.ones(4000, dtype=torch.float64), 1e-6)
    error = (utility.weight - truth) / utility.covariance.diagonal().sqrt()
    assert error.abs().max() < 3  # within three standard errors by Laplace's approximation
    assert (utility.weight - truth).abs().max() < 0.2


def test_one_comparison_of_one_feature_tells_half_the_log_of_one_plus_p_q_v():
    utility = Utility(torch.tensor([1.0], dtype=torch.float64), torch.tensor([[4.0]], dtype=torch.float64))
    p = 1 / (1 + math.exp(-0.5))
    expected = math.log1p(p * (1 - p) * 4 * 0.25) / 2
    assert utility.information(torch.tensor([[0.5], [0.0]])) == pytest.approx(expected)


def test_images_far_apart_in_an_unknown_direction_tell_most():
    difference = torch.tensor([[1.0, 0.0]], dtype=torch.float64).repeat(50, 1)
    utility = fit_utility(difference, torch.ones(50, dtype=torch.float64), 1.0)
    known, unknown = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    assert utility.information(unknown) > 2 * utility.information(known)


def test_expected_scores_are_the_mean_of_the_votes_that_the_model_expects():
    utility = Utility(torch.tensor([1.0], dtype=torch.float64), torch.eye(1, dtype=torch.float64))
    scores = utility.expected_scores(torch.tensor([[0.0], [math.log(3)], [-50.0]]))
    torch.testing.assert_close(scores, torch.tensor([0.25, 0.75, -1.0]))  # against each other: 1/4 and 3/4
