"""Implicit reward guidance composes models, bit for bit at its ends."""

import pytest
import torch

from comfyui_pcpo.method.guidance import ImplicitReward, cfg, irg, proportionate_schedule
from comfyui_pcpo.method.samplers import transitions
from comfyui_pcpo.method.schedule import ddim_grid
from comfyui_pcpo.method.transition import Transition

torch.set_num_threads(1)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def predictions(n, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 4, 4, generator=g, dtype=torch.float64).to(dtype) for _ in range(n)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_lambda_zero_is_the_base_exactly(dtype):
    base, one, two = predictions(3, dtype)
    assert torch.equal(irg(base, [one, two], [0.0, 0.0]), base)
    assert torch.equal(irg(base, [], []), base)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lambda_one_is_the_aligned_model_exactly(dtype):
    base, one, two = predictions(3, dtype)
    assert torch.equal(irg(base, [one], [1.0]), one)
    assert torch.equal(irg(base, [one, two], [0.0, 1.0]), two)


def test_guidance_is_the_weighted_sum_of_differences():
    base, one, two = predictions(3)
    expected = base + 1.5 * (one - base) - 0.5 * (two - base)
    assert torch.allclose(irg(base, [one, two], [1.5, -0.5]), expected, rtol=1e-12)


def test_guidance_leaves_its_inputs_alone():
    base, one = predictions(2)
    before = base.clone(), one.clone()
    irg(base, [one], [2.0])
    assert torch.equal(base, before[0])
    assert torch.equal(one, before[1])


def test_combining_before_or_after_cfg_is_the_same():
    u0, c0, u1, c1, u2, c2 = predictions(6)
    weights, scale = [0.8, -0.3], 4.5
    after = irg(cfg(u0, c0, scale), [cfg(u1, c1, scale), cfg(u2, c2, scale)], weights)
    before = cfg(irg(u0, [u1, u2], weights), irg(c0, [c1, c2], weights), scale)
    assert torch.allclose(after, before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cfg_of_one_is_the_conditional_exactly(dtype):
    uncond, cond = predictions(2, dtype)
    assert torch.equal(cfg(uncond, cond, 1.0), cond)
    assert cfg(uncond, cond, 2.0).dtype == dtype
    assert irg(uncond, [cond], [2.0]).dtype == dtype


def test_a_weight_per_model_is_demanded():
    base, one = predictions(2)
    with pytest.raises(ValueError, match="2 weights for 1 aligned models"):
        irg(base, [one], [1.0, 2.0])


def test_adjacent_windows_meet_without_overlap():
    early, late = ImplicitReward(1.0, 0.0, 0.5), ImplicitReward(2.0, 0.5, 1.0)
    for progress, expected in [(0.0, (1, 0)), (0.49, (1, 0)), (0.5, (0, 2)), (1.0, (0, 2))]:
        assert (early.weight_at(progress), late.weight_at(progress)) == expected


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.5), (-0.1, 1.0), (0.0, 1.1)])
def test_an_empty_or_outlying_window_is_refused(start, end):
    with pytest.raises(ValueError, match="0 <= start < end <= 1"):
        ImplicitReward(1.0, start, end)


def test_proportionate_schedule_times_the_native_weight_is_constant():
    trs = transitions(ddim_grid(20), "ddim", 1.0)
    schedule = proportionate_schedule(trs, 0.98)
    assert [lam * tr.weight for lam, tr in zip(schedule, trs, strict=True)] == pytest.approx([0.98] * 20)


def test_proportionate_schedule_is_zero_on_a_step_without_noise():
    assert proportionate_schedule([Transition(1.0, -0.1, 0.0)], 1.0) == [0.0]
    with pytest.raises(ValueError, match="target is 0"):
        proportionate_schedule([], 0)
