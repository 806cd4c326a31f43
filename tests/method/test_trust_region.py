"""The exact-KL mask drops the terms that are too far and go further, and no others."""

import math

import pytest
import torch

from comfyui_pcpo.method.surrogate import OBJECTIVES, importance_weighted, kl, log_ratio, ppo
from comfyui_pcpo.method.transition import Transition
from comfyui_pcpo.method.trust_region import kl_mask, kl_masked


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


CASES = [  # KL, log rho, A, dropped at a bound of .1
    (0.2, 0.3, 2.0, True),
    (0.2, -0.3, 2.0, False),
    (0.2, -0.3, -2.0, True),
    (0.2, 0.3, -2.0, False),
    (0.05, 0.3, 2.0, False),
    (0.05, -0.3, -2.0, False),
    (0.1, 0.3, 2.0, True),
    (0.2, 0.3, 0.0, False),
    (0.2, 0.0, 2.0, False),
]


@pytest.mark.parametrize(("divergence", "log_rho", "advantage", "dropped"), CASES)
def test_a_term_is_dropped_beyond_the_bound_where_its_gradient_points_outward(divergence, log_rho, advantage, dropped):
    x, a = numbers(log_rho).requires_grad_(), numbers(advantage)
    masked = kl_mask(numbers(divergence), x, a, 0.1)
    assert masked.tolist() == [dropped]
    (gradient,) = torch.autograd.grad(kl_masked(importance_weighted(x, a), masked).sum(), x)
    expected = 0.0 if dropped else -advantage * torch.tensor(log_rho, dtype=torch.float64).exp().item()
    assert gradient.item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_unclipped_objective_equals_the_clipped_one_inside_its_clip_range(name):
    x, a = numbers(0.01, -0.02, 0.03), numbers(1.0, -2.0, 0.5)
    unclipped, clipped = OBJECTIVES[name].unclipped(x, a, 0.1), OBJECTIVES[name].loss(x, a, 0.1)
    assert torch.equal(unclipped, clipped)
    far = numbers(5.0).requires_grad_()
    (gradient,) = torch.autograd.grad(OBJECTIVES[name].unclipped(far, numbers(1.0), 0.1).sum(), far)
    assert gradient.item() < 0


def test_an_infinite_ratio_that_is_masked_has_no_gradient():
    x, a = torch.tensor([1000.0, 0.1], requires_grad=True), torch.ones(2)
    masked = kl_mask(torch.tensor([9.0, 0.0]), x, a, 1e-5)
    (gradient,) = torch.autograd.grad(kl_masked(importance_weighted(kl_masked(x, masked), a), masked).sum(), x)
    torch.testing.assert_close(gradient, torch.tensor([0.0, -math.exp(0.1)]))


def test_an_infinite_ratio_that_is_clipped_has_no_gradient_and_one_that_is_not_stays_infinite():
    x, a = torch.tensor([1000.0, 1000.0], requires_grad=True), torch.tensor([1.0, 0.0])
    loss = ppo(x, a, 0.1)
    torch.testing.assert_close(loss.detach(), torch.tensor([-1.1, 0.0]))
    assert torch.autograd.grad(loss.sum(), x)[0].tolist() == [0, 0]
    assert ppo(torch.tensor([1000.0]), torch.tensor([-1.0]), 0.1).item() == math.inf


def test_the_divergence_is_that_of_the_two_gaussians_and_does_not_depend_on_the_noise_drawn():
    g = torch.Generator().manual_seed(0)
    d = 0.1 * torch.randn(3, 2, 4, 4, generator=g, dtype=torch.float64)
    tr = Transition(1.0, -0.3, 0.2)
    noises = [torch.randn(d.shape, generator=g, dtype=torch.float64) for _ in range(400)]
    ratios = torch.stack([log_ratio(d, z, tr.weight) for z in noises])
    # E[-log rho] under the old policy is KL(old || new), which for one std is the same as KL(new || old)
    torch.testing.assert_close(-ratios.mean(0), kl(d, tr), atol=4e-3, rtol=0)
    assert (kl_mask(kl(d, tr), ratios[0], torch.ones(3), 1e9)).tolist() == [False] * 3


def test_a_bound_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="KL bound is 0"):
        kl_mask(numbers(1.0), numbers(1.0), numbers(1.0), 0)
