"""Which steps train, the run's one zeta, and published weightings."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from comfyui_pcpo.method.credit import (
    PUBLISHED,
    level_weights,
    loss_weights,
    target_weights,
)
from comfyui_pcpo.method.samplers import METHODS, SamplerSettings, default_noise_level, deterministic, transitions
from comfyui_pcpo.method.schedule import ddim_grid, flow_grid, flow_grid_from_sigmas
from comfyui_pcpo.method.surrogate import FORMS, OBJECTIVES
from comfyui_pcpo.method.trained_steps import StepSelection, choose_steps, stratified_levels

torch.set_num_threads(1)
# the sigmas of SD3.5 at 10 steps in diffusers, in four digits
SD35 = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]


def settings(method="flow_sde"):
    return SamplerSettings(method, default_noise_level(method))


def run_weights(grid, sampler, trainable):
    """PCPO's credit as a run takes it: over all trainable steps, each of them stochastic."""
    return target_weights(sampler.transitions(grid), grid, "proportionate", trainable)


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (StepSelection(), [0, 1, 2, 3, 4, 5]),
        (StepSelection(first=2), [0, 1]),
        (StepSelection(skip_last=2), [0, 1, 2, 3]),
        (StepSelection(skip_last=1, first=9), [0, 1, 2, 3, 4]),
    ],
)
def test_a_selection_without_a_share_is_the_same_in_every_update(selection, expected):
    steps = selection.of_run(range(6), 6)
    for seed in range(5):
        assert choose_steps(np.random.default_rng(seed), steps) == expected


def test_the_last_steps_are_those_of_the_grid_even_if_they_cannot_be_trained():
    """The last step of cps has no noise, so leaving out the last step costs no other one."""
    assert StepSelection(skip_last=1).of_run(range(5), 6) == [0, 1, 2, 3, 4]


def test_a_random_share_is_drawn_from_the_steps_of_the_run_and_visits_all():
    able = StepSelection(skip_last=1).of_run(range(6), 6)
    drawn = [choose_steps(np.random.default_rng(seed), able, 0.6) for seed in range(300)]
    assert all(len(steps) == 3 and steps == sorted(set(steps)) for steps in drawn)
    counts = np.bincount(np.concatenate(drawn))
    assert len(counts) == 5
    assert np.abs(counts / 180 - 1).max() < 0.2  # 300 * 3 / 5
    assert len(choose_steps(np.random.default_rng(0), able, 0.01)) == 1


def test_selection_errors_name_the_rule():
    with pytest.raises(ValueError, match="share is 0"):
        choose_steps(np.random.default_rng(0), range(6), 0)
    with pytest.raises(ValueError, match="first is -1"):
        StepSelection(first=-1)
    with pytest.raises(ValueError, match="none of the 6 steps can be trained"):
        StepSelection(skip_last=6).of_run(range(6), 6)


@pytest.mark.parametrize("method", METHODS)
def test_the_runs_credit_does_not_change_with_the_steps_that_an_update_trains(method):
    grid = ddim_grid(8) if method == "ddim" else flow_grid(8)
    weights = run_weights(grid, settings(method), range(7))
    zeta = weights[:7] / grid.dt[:7]
    assert torch.allclose(zeta, zeta[0].expand(7), rtol=1e-13)
    native = torch.tensor([s.weight for s in settings(method).transitions(grid)[:7]], dtype=torch.float64)
    assert weights.sum().item() == pytest.approx(native.sum().item(), rel=1e-13)
    # an update that trains one step takes its weight from here: it is not the native one
    assert (weights[:7] / native - 1).abs().max() > 0.1


def test_a_zeta_of_each_update_would_make_a_window_of_one_step_native_and_vary_by_3_9():
    grid = flow_grid_from_sigmas(SD35)
    stochastic, ode = settings().transitions(grid), deterministic(grid)
    zetas = []
    for i in range(9):
        window = [s if i == j else o for j, (s, o) in enumerate(zip(stochastic, ode, strict=True))]
        own = target_weights(window, grid, "proportionate", [i])
        assert own[i].item() == pytest.approx(stochastic[i].weight, rel=1e-13)
        zetas.append((own[i] / grid.dt[i]).item())
    run = run_weights(grid, settings(), range(9))
    assert (run[0] / grid.dt[0]).item() == pytest.approx(3.9702, abs=2e-4)
    assert max(zetas) / min(zetas) == pytest.approx(3.87, abs=0.01)


def test_the_runs_weights_reproduce_the_papers_zetas():
    for steps, trainable, expected in ((16, 16, 13.3431909148), (12, 12, 11.4841574422)):
        weights = run_weights(flow_grid(steps), settings("dance_sde"), range(trainable))
        assert weights.sum().item() == pytest.approx(expected, abs=5e-11)  # sum dt = 1
    ddim = run_weights(ddim_grid(50), settings("ddim"), range(50))
    assert ddim.tolist() == pytest.approx([0.5169001648] * 50, abs=5e-11)


def gradients(grid, name, objective="matching"):
    """|d loss / d out| of every trained step at ratio 1, for one direction and advantage, (T,)."""
    how, trainable = PUBLISHED[name], range(grid.steps - 1)
    steps = settings().transitions(grid)
    credit = target_weights(steps, grid, how.credit, trainable, how.rescaled)
    outside = loss_weights(steps, grid, how.loss_weight, trainable)
    z, slopes = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64), []
    for i in trainable:
        d = torch.zeros_like(z, requires_grad=True)
        ratio = FORMS[how.form](d, z, float(credit[i]), steps[i].weight)
        loss = outside[i] * OBJECTIVES[objective].loss(ratio, torch.ones(1, dtype=torch.float64), 1e-3)
        slopes.append(torch.autograd.grad(loss.sum(), d)[0].norm())
    return torch.stack(slopes)


def test_published_tempflow_and_guard_differ_per_step_by_6_7():
    grid = flow_grid_from_sigmas(SD35)
    tempflow, guard = gradients(grid, "tempflow_grpo"), gradients(grid, "grpo_guard")
    ratio = tempflow / guard
    assert (ratio.max() / ratio.min()).item() == pytest.approx(6.7, abs=0.05)
    assert torch.allclose(ratio / grid.dt[:9], (ratio / grid.dt[:9])[0].expand(9), rtol=1e-12)
    # TempFlow's gradient is |B| = w s; after the first step that is PCPO's dt, up to a constant
    later = tempflow[1:] / gradients(grid, "pcpo")[1:]
    assert torch.allclose(later, later[0].expand(8), rtol=1e-12)


def test_tempflow_outside_the_clip_clips_other_terms_than_inside():
    grid = flow_grid_from_sigmas(SD35)
    steps, trainable = settings().transitions(grid), range(9)
    inside = target_weights(steps, grid, "tempflow", trainable)
    native = torch.tensor([s.weight for s in steps[:9]], dtype=torch.float64)
    factor = native * loss_weights(steps, grid, "tempflow", trainable)[:9] / inside[:9]
    assert torch.allclose(factor, factor[0].expand(9), rtol=1e-12)  # the same gradient at ratio 1
    d = torch.full((1, 1, 2, 2), -0.01, dtype=torch.float64)
    z, a = torch.ones_like(d), torch.ones(1, dtype=torch.float64)
    clipped = [
        [bool(OBJECTIVES["ppo"].clipped(FORMS["exact"](d, z, float(w), 1.0), a, 2e-3)) for w in weights]
        for weights in (native, inside[:9])
    ]
    assert clipped[0] != clipped[1]


def test_published_guard_is_b_over_dt_without_the_bias():
    grid = flow_grid(10)
    steps = settings().transitions(grid)
    weights = target_weights(steps, grid, "guard_dt", range(9), rescaled=False)
    assert weights[1:9].tolist() == pytest.approx([1 + 0.7**2 / 2] * 8, rel=1e-12)  # flow_sde at t < 1
    assert PUBLISHED["grpo_guard"].form == "linear"
    d = torch.full((1, 1, 2, 2), 0.1)
    assert FORMS["linear"](d, torch.zeros_like(d), 1.0, 1.0).item() == 0


def test_loss_weights_have_mean_1_over_the_run():
    grid = flow_grid(8)
    steps = transitions(grid, "dance_sde", 0.3)
    for kind in ("none", "tempflow"):
        weights = loss_weights(steps, grid, kind, range(7))
        assert weights[:7].mean().item() == pytest.approx(1, rel=1e-14)
        assert weights[7] == 0
    with pytest.raises(ValueError, match="loss_weight is 'fair'"):
        loss_weights(steps, grid, "fair", range(7))


def test_levels_are_weighted_by_dt_or_evenly():
    grid = flow_grid(6)
    proportionate = level_weights(grid, "proportionate", range(5))
    assert proportionate[:5].mean().item() == pytest.approx(1, rel=1e-14)
    assert torch.allclose(proportionate[:5] / grid.dt[:5], (proportionate[0] / grid.dt[0]).expand(5))
    assert level_weights(grid, "uniform", range(5)).tolist() == [1, 1, 1, 1, 1, 0]
    with pytest.raises(ValueError, match="credit is 'native'"):
        level_weights(grid, "native", range(5))


@pytest.mark.parametrize(("steps", "count"), [(6, 3), (7, 3), (5, 5), (9, 1)])
def test_one_level_is_drawn_from_each_stratum_and_the_mean_is_unbiased(steps, count):
    values = np.arange(steps) ** 2.0
    strata = np.array_split(np.arange(steps), count)
    draws = [stratified_levels(np.random.default_rng(seed), range(steps), count) for seed in range(3000)]
    assert all(i in stratum for levels in draws for i, stratum in zip(levels.steps, strata, strict=True))
    assert all(a < b for levels in draws for a, b in pairwise(levels.steps))
    means = [np.mean(np.array(levels.weights) * values[levels.steps]) for levels in draws]
    # exactly: each stratum contributes its own mean
    exact = np.mean([w * values[s].mean() for w, s in zip(draws[0].weights, strata, strict=True)])
    assert exact == pytest.approx(values.mean(), rel=1e-14)
    assert np.mean(means) == pytest.approx(values.mean(), rel=0.06)
    if 1 < count < steps:
        free = np.random.default_rng(0).choice(values, (3000, count)).mean(1)
        assert np.std(means) < np.std(free)
