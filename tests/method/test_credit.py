"""Credit keeps the sum of the weights; DDIM sigmas carry the weight they are asked for."""

import math
from itertools import pairwise

import pytest
import torch

from comfyui_pcpo.method.credit import CREDITS, target_weights
from comfyui_pcpo.method.ddim_variance import ddim_native_sigma, ddim_sigma, smallest_target
from comfyui_pcpo.method.samplers import METHODS, default_noise_level, transitions
from comfyui_pcpo.method.schedule import ddim_grid, flow_grid, flow_grid_from_sigmas

torch.set_num_threads(1)


def run(method, steps, noise_level=None):
    grid = ddim_grid(steps) if method == "ddim" else flow_grid(steps)
    return grid, transitions(grid, method, default_noise_level(method) if noise_level is None else noise_level)


def zeta(method, steps, trained):
    grid, trs = run(method, steps)
    weights = target_weights(trs, grid, "proportionate", trained)
    return (weights.sum() / grid.dt[list(trained)].sum()).item()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("credit", CREDITS)
def test_every_credit_keeps_the_sum_of_the_native_weights(method, credit):
    grid, trs = run(method, 8)
    trained = [0, 2, 3, 6]
    weights = target_weights(trs, grid, credit, trained)
    assert weights.dtype == torch.float64
    assert weights.sum().item() == pytest.approx(sum(trs[i].weight for i in trained), rel=1e-14)
    assert [i for i, w in enumerate(weights.tolist()) if w == 0] == [1, 4, 5, 7]


def test_native_credit_is_the_native_weights():
    grid, trs = run("dance_sde", 8)
    assert target_weights(trs, grid, "native", range(8)).tolist() == [tr.weight for tr in trs]


def test_proportionate_credit_follows_dt():
    grid, trs = run("dance_sde", 8)
    ratio = target_weights(trs, grid, "proportionate", range(7))[:7] / grid.dt[:7]
    assert torch.allclose(ratio, ratio[0].expand(7), rtol=1e-14)


def test_proportionate_credit_is_uniform_for_ddim():
    grid, trs = run("ddim", 50)
    proportionate = target_weights(trs, grid, "proportionate", range(50))
    assert torch.allclose(proportionate, target_weights(trs, grid, "uniform", range(50)), rtol=1e-14)
    assert proportionate[0].item() == pytest.approx(0.5169001648, abs=5e-11)


def test_flux_zeta_at_16_steps():
    assert zeta("dance_sde", 16, range(16)) == pytest.approx(13.3431909148, abs=5e-11)
    assert zeta("dance_sde", 16, range(16)) == pytest.approx(13.343, abs=5e-4)  # the paper's
    assert zeta("dance_sde", 16, range(15)) == pytest.approx(14.0114, abs=5e-5)


def test_flux_credit_factor_at_16_steps():
    grid, trs = run("dance_sde", 16)
    native = torch.tensor([tr.weight for tr in trs], dtype=torch.float64)
    every = target_weights(trs, grid, "proportionate", range(16)) / native
    assert (every.min().item(), every.max().item()) == pytest.approx((0.590, 1.334), abs=5e-4)
    but_last = (target_weights(trs, grid, "proportionate", range(15)) / native)[:15]
    assert (but_last.min().item(), but_last.max().item()) == pytest.approx((0.6198, 1.3890), abs=5e-5)


def test_flux_zeta_at_12_steps():
    assert zeta("dance_sde", 12, range(12)) == pytest.approx(11.4841574422, abs=5e-11)


def test_sd35_zeta_on_the_grid_diffusers_uses():
    # the printed sigmas have four digits
    grid = flow_grid_from_sigmas([1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0])
    weights = target_weights(transitions(grid, "flow_sde", 0.7), grid, "proportionate", range(9))
    assert (weights.sum() / grid.dt[:9].sum()).item() == pytest.approx(3.9702, abs=2e-4)


def test_on_flow_sde_after_the_first_step_tempflow_and_guard_are_proportionate():
    grid, trs = run("flow_sde", 10)
    later = range(1, 10)
    expected = target_weights(trs, grid, "proportionate", later)
    assert torch.allclose(target_weights(trs, grid, "tempflow", later), expected, rtol=1e-13)
    assert torch.allclose(target_weights(trs, grid, "guard", later), expected, rtol=1e-13)
    assert [-tr.b for tr in trs[1:]] == pytest.approx((grid.dt[1:] * (1 + 0.7**2 / 2)).tolist(), rel=1e-13)


@pytest.mark.parametrize("method", METHODS)
def test_tempflow_and_guard_are_one_credit_because_w_s_is_b(method):
    grid, trs = run(method, 8)
    tempflow, guard = (target_weights(trs, grid, credit, range(7)) for credit in ("tempflow", "guard"))
    assert torch.allclose(tempflow, guard, rtol=1e-14)


def test_guard_dt_divides_by_dt():
    grid, trs = run("dance_sde", 8)
    size = torch.tensor([abs(tr.b) for tr in trs], dtype=torch.float64)
    ratio = target_weights(trs, grid, "guard_dt", range(8)) / size * grid.dt
    assert torch.allclose(ratio, ratio[0].expand(8), rtol=1e-13)


@pytest.mark.parametrize("steps", [20, 50])
def test_uniform_sigma_gives_exactly_the_wanted_weight_at_every_step(steps):
    for target in (6.0, 20.0, 1000.0):
        trs = transitions(ddim_grid(steps), "ddim", 1.0, "uniform", target)
        assert [tr.weight for tr in trs] == pytest.approx([target] * steps, rel=1e-12, abs=0)


def test_uniform_sigma_at_4_5_is_nearly_deterministic():
    assert span_of_sigma("uniform") == pytest.approx((0.0430, 0.6063), abs=5e-5)


def test_uniform_sigma_at_its_smallest_target_is_4_to_60_percent_of_native():
    low, high = span_of_sigma("uniform", 3.2748)
    assert 0.04 < low < 0.07
    assert high == pytest.approx(1.0, abs=0.01)  # at t = 21 the smallest target is the native weight itself


def span_of_sigma(choice, target=4.5):
    levels = ddim_grid(50).levels.tolist()
    pairs = list(pairwise(levels))
    ratios = [ddim_sigma(*pair, choice, target) / ddim_native_sigma(*pair, 1.0) for pair in pairs]
    return min(ratios), max(ratios)


def test_paper_sigma_at_4_5_is_near_native_and_its_true_weight_is_not_uniform():
    assert span_of_sigma("paper") == pytest.approx((0.7129, 1.2474), abs=5e-5)
    weights = [tr.weight for tr in transitions(ddim_grid(50), "ddim", 1.0, "paper", 4.5)]
    assert (min(weights), max(weights)) == pytest.approx((0.3850, 3.3684), abs=5e-5)


def test_paper_sigma_solves_the_other_branch_above_a_over_b():
    levels, w = ddim_grid(50).levels.tolist(), 4.5
    for ab_t, ab_prev in pairwise(levels):
        a, b = math.sqrt((1 - ab_t) * ab_prev / ab_t), math.sqrt(1 - ab_prev)
        s = ddim_sigma(ab_t, ab_prev, "paper", w)
        sign = 1 if w > a / b else -1
        assert (a + sign * math.sqrt(b**2 - s**2)) / s == pytest.approx(w, rel=1e-9)


def test_paper_sigma_below_a_over_b_has_the_wanted_weight():
    ab_t, ab_prev = 0.5, 0.999  # a / b = 31.6 and w_min = 31.6
    a, b = math.sqrt((1 - ab_t) * ab_prev / ab_t), math.sqrt(1 - ab_prev)
    w = (math.sqrt(a**2 / b**2 - 1) + a / b) / 2
    s = ddim_sigma(ab_t, ab_prev, "paper", w)
    assert (a - math.sqrt(b**2 - s**2)) / s == pytest.approx(w, rel=1e-9)


def test_native_sigma_at_eta_one_sits_on_the_smallest_target():
    grid = ddim_grid(50)
    weights = [tr.weight for tr in transitions(grid, "ddim", 1.0)]
    assert smallest_target(grid) == pytest.approx(max(weights), rel=1e-13)
    assert smallest_target(grid) == pytest.approx(3.275, abs=5e-4)
    assert ddim_sigma(0.3, 0.4, "native") == ddim_native_sigma(0.3, 0.4, 1.0)


@pytest.mark.parametrize("choice", ["uniform", "paper"])
def test_an_impossible_target_is_refused_with_the_smallest_that_works_on_the_whole_grid(choice):
    with pytest.raises(ValueError, match=r"target_weight is 3.0.* one of the grid's 50 steps .* below 3.2748"):
        transitions(ddim_grid(50), "ddim", 1.0, choice, 3.0)
    assert all(tr.std > 0 for tr in transitions(ddim_grid(50), "ddim", 1.0, choice, 3.2748))


def test_a_missing_target_is_refused():
    with pytest.raises(ValueError, match="target_weight is None"):
        transitions(ddim_grid(50), "ddim", 1.0, "uniform")


def test_a_step_to_alpha_one_gets_no_noise_from_any_rule():
    trs = transitions(ddim_grid(50, set_alpha_to_one=True), "ddim", 1.0, "uniform", 4.5)
    assert trs[-1].std == 0
    assert all(tr.std > 0 for tr in trs[:-1])


def test_a_step_without_noise_cannot_be_trained():
    grid, trs = run("cps", 4)
    with pytest.raises(ValueError, match="step 3 has std 0"):
        target_weights(trs, grid, "native", range(4))
    assert target_weights(trs, grid, "native", range(3))[3] == 0


@pytest.mark.parametrize("trained", [[], [0, 0], [4], [-1]])
def test_trained_steps_are_distinct_and_on_the_grid(trained):
    grid, trs = run("dance_sde", 4)
    with pytest.raises(ValueError, match="must be different numbers from 0 to 3"):
        target_weights(trs, grid, "native", trained)


def test_credit_errors_name_the_rule():
    grid, trs = run("dance_sde", 4)
    with pytest.raises(ValueError, match="credit is 'fair'"):
        target_weights(trs, grid, "fair", [0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="3 transitions for a grid of 4"):
        target_weights(trs[:3], grid, "native", [0])
    with pytest.raises(ValueError, match="sigma is 'other'"):
        ddim_sigma(0.3, 0.4, "other", 4.5)  # type: ignore[arg-type]
