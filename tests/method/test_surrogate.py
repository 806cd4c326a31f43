"""The surrogate's values by hand, its gradients against finite differences."""

import math

import pytest
import torch

from comfyui_pcpo.method.surrogate import (
    FORMS,
    OBJECTIVES,
    is_clipped,
    kl,
    log_hinge,
    log_ratio,
    log_ratio_linear,
    log_ratio_scaled,
    matching,
    ppo,
    taylor_error,
)
from comfyui_pcpo.method.transition import Transition, mean

torch.set_num_threads(1)


def pair(dtype=torch.float64, scale=0.01):
    g = torch.Generator().manual_seed(0)
    d, z = (torch.randn(3, 2, 4, 4, generator=g, dtype=torch.float64) for _ in range(2))
    return (scale * d).to(dtype), z.to(dtype)


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_log_ratio_by_hand():
    d = torch.tensor([[[[1.0, 2.0]]]])
    z = torch.tensor([[[[3.0, -1.0]]]])
    # <d, z> = 1/2, |d|^2 = 5/2: -(2 * 1/2 + 4/2 * 5/2) = -6
    assert log_ratio(d, z, 2.0).tolist() == [-6.0]
    assert log_ratio_linear(d, z, 2.0).tolist() == [-1.0]
    assert log_ratio_scaled(d, z, 1.0, 2.0).tolist() == [-3.0]


def test_credit_is_the_same_as_scaling_the_difference_of_the_means():
    d, z = pair()
    w, k, std = 0.7, 1.9, 0.4
    shift = -w * std * d * k  # k (mean_new - mean_old)
    normal = torch.distributions.Normal(torch.zeros_like(z), std)
    expected = (normal.log_prob(std * z - shift) - normal.log_prob(std * z)).flatten(1).mean(1)
    assert torch.allclose(log_ratio(d, z, k * w), expected, rtol=0, atol=1e-12)


def test_the_three_forms_agree_to_first_order_and_at_native_credit():
    d, z = pair(scale=1e-6)
    exact, scaled, linear = (FORMS[form](d, z, 1.5, 0.5) for form in ("exact", "scale", "linear"))
    assert torch.allclose(scaled, exact, rtol=1e-4)
    assert torch.allclose(linear, exact, rtol=1e-4)
    assert torch.equal(FORMS["scale"](d, z, 0.5, 0.5), FORMS["exact"](d, z, 0.5, 0.5))


def test_the_linear_form_removes_the_negative_bias():
    d, z = pair()
    bias = log_ratio(d, z, 2.0) - log_ratio_linear(d, z, 2.0)
    assert torch.allclose(bias, -2 * d.square().flatten(1).mean(1), rtol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_per_image_equals_one_weight_at_a_time(form):
    d, z = pair()
    weights, native = numbers(0.1, 1.0, 10.0), numbers(0.2, 0.5, 3.0)
    together = FORMS[form](d, z, weights, native)
    for i in range(3):
        alone = FORMS[form](d[i : i + 1], z[i : i + 1], weights[i].item(), native[i].item())
        assert together[i].item() == pytest.approx(alone.item(), rel=1e-12)
    assert torch.equal(FORMS[form](d, z, torch.tensor(2.0), 1.0), FORMS[form](d, z, 2.0, 1.0))


@pytest.mark.parametrize("form", FORMS)
def test_no_change_gives_a_ratio_of_exactly_one(form):
    _, z = pair()
    assert FORMS[form](torch.zeros_like(z), z, 3.0, 2.0).exp().tolist() == [1.0] * 3


def test_a_weight_of_the_wrong_length_is_refused():
    d, z = pair()
    with pytest.raises(ValueError, match=r"weight has shape \(2,\), but it is a number or one per image, \(3,\)"):
        log_ratio(d, z, numbers(1, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_everything_is_float32_or_wider(dtype):
    d, z = pair(dtype)
    advantage = torch.tensor([1.0, -1.0, 0.5], dtype=dtype)
    for form in FORMS.values():
        assert form(d, z, torch.ones(3, dtype=dtype), 1.0).dtype == torch.float32
        assert form(d.double(), z, 1.0, 1.0).dtype == torch.float64
    for objective in OBJECTIVES.values():
        assert objective.loss(torch.zeros(3, dtype=dtype), advantage, 1e-4).dtype == torch.float32
    assert taylor_error(torch.zeros(3, dtype=dtype)).dtype == torch.float32
    assert kl(d, Transition(1.0, -0.1, 0.2)).dtype == torch.float32
    assert torch.equal(log_ratio(d, z, 1.5), log_ratio(d.float(), z.float(), 1.5))


XI = 0.1
CASES = [  # rho, A, ppo, clipped by ppo
    (1.05, 2.0, -2.10, False),
    (1.20, 2.0, -2.20, True),
    (0.80, 2.0, -1.60, False),
    (0.95, -2.0, 1.90, False),
    (0.80, -2.0, 1.80, True),
    (1.20, -2.0, 2.40, False),
    (1.20, 0.0, 0.0, False),
]


@pytest.mark.parametrize(("rho", "advantage", "expected", "clipped"), CASES)
def test_ppo_by_hand_with_both_signs_of_the_advantage(rho, advantage, expected, clipped):
    log_rho, a = numbers(math.log(rho)), numbers(advantage)
    assert ppo(log_rho, a, XI).item() == pytest.approx(expected, abs=1e-12)
    assert is_clipped(log_rho, a, XI, "ppo").tolist() == [clipped]


@pytest.mark.parametrize(
    ("log_rho", "advantage", "hinge", "unclipped", "clipped"),
    [
        (0.05, 2.0, 0.10, 0.10, False),
        (0.20, 2.0, 0.00, -0.20, True),
        (-0.20, 2.0, 0.60, 0.60, False),
        (-0.05, -2.0, 0.10, 0.10, False),
        (-0.20, -2.0, 0.00, -0.20, True),
        (0.20, -2.0, 0.60, 0.60, False),
        (0.20, 0.0, 0.00, 0.00, False),
    ],
)
def test_log_hinge_and_matching_by_hand_with_both_signs(log_rho, advantage, hinge, unclipped, clipped):
    x, a = numbers(log_rho), numbers(advantage)
    assert log_hinge(x, a, XI).item() == pytest.approx(hinge, abs=1e-12)
    assert matching(x, a, XI).item() == pytest.approx(unclipped, abs=1e-12)
    assert is_clipped(x, a, XI, "log_hinge").tolist() == [clipped]
    assert is_clipped(x, a, XI, "matching").tolist() == [False]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_term_is_clipped_exactly_where_its_gradient_is_zero_on_either_side_of_the_edge(objective, sign):
    edge = math.log(1 + sign * XI) if objective == "ppo" else sign * XI
    x = numbers(edge - 1e-9, edge + 1e-9).requires_grad_()
    a = numbers(sign, sign)
    (grad,) = torch.autograd.grad(OBJECTIVES[objective].loss(x, a, XI).sum(), x)
    clipped = is_clipped(x, a, XI, objective)
    assert torch.equal(clipped, grad == 0)
    assert clipped.tolist() == ([False] * 2 if objective == "matching" else [sign < 0, sign > 0])


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("form", FORMS)
def test_surrogate_gradient_equals_finite_differences(objective, form):
    d, z = pair()
    advantage = numbers(1.3, -0.7, 0.4)

    def loss(d):
        return OBJECTIVES[objective].loss(FORMS[form](d, z, 0.9, 0.6), advantage, 0.05)

    assert torch.autograd.gradcheck(loss, d.requires_grad_(), eps=1e-6, atol=1e-9, rtol=1e-6)


def test_log_hinge_gradient_equals_ppo_gradient_at_ratio_one():
    x, a = numbers(0.0, 0.0).requires_grad_(), numbers(1.5, -2.0)
    (hinge,) = torch.autograd.grad(log_hinge(x, a, 1e-4).sum(), x)
    (clipped,) = torch.autograd.grad(ppo(x, a, 1e-4).sum(), x)
    assert torch.equal(hinge, clipped)


def test_a_ratio_change_of_1e_4_survives_in_float32():
    x, a = torch.tensor([1.01e-4, 0.99e-4]), torch.ones(2)
    assert is_clipped(x, a, 1e-4, "ppo").tolist() == [True, False]


def test_an_unknown_objective_is_refused():
    with pytest.raises(ValueError, match="objective is 'dpo'"):
        is_clipped(numbers(0.0), numbers(1.0), XI, "dpo")


def test_taylor_error_is_second_order():
    assert taylor_error(numbers(0.0, 1.0, -1.0)).tolist() == pytest.approx([0, math.e - 2, math.exp(-1)], abs=1e-15)
    assert taylor_error(numbers(1e-4)).item() == pytest.approx(5e-9, rel=1e-4)


def test_kl_equals_the_kl_of_two_normals():
    d, x = pair()
    tr = Transition(1.2, -0.3, 0.05)
    new, ref = (torch.distributions.Normal(mean(x, out, tr), tr.std) for out in (d, torch.zeros_like(d)))
    expected = torch.distributions.kl_divergence(new, ref).flatten(1).mean(1)
    assert torch.allclose(kl(d, tr), expected, rtol=1e-10)


def test_kl_of_a_step_without_noise_is_refused():
    with pytest.raises(ValueError, match="std is 0"):
        kl(pair()[0], Transition(1.0, -0.1, 0.0))
