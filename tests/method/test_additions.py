"""A sampler, a credit and an objective are each added by one function and one line of a table."""

import pytest
import torch

from comfyui_pcpo.method.credit import CREDITS, target_weights
from comfyui_pcpo.method.samplers import SAMPLERS, Sampler, default_noise_level, transitions
from comfyui_pcpo.method.schedule import flow_grid
from comfyui_pcpo.method.surrogate import OBJECTIVES, SurrogateLoss, is_clipped
from comfyui_pcpo.method.transition import Transition

torch.set_num_threads(1)


def half_noise(t: float, t_next: float, level: float) -> Transition:
    return Transition(1.0, t_next - t, level * (t - t_next))


def test_a_new_sampler_is_a_step_and_a_line(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "half_noise", Sampler("flow", half_noise, 0.5, 1.0))
    grid = flow_grid(4)
    steps = transitions(grid, "half_noise", default_noise_level("half_noise"))
    assert [step.std for step in steps] == pytest.approx([0.5 * dt for dt in grid.dt.tolist()])
    with pytest.raises(ValueError, match="half_noise takes 0 to 1"):
        transitions(grid, "half_noise", 2.0)
    with pytest.raises(ValueError, match="takes dance_sde or flow_sde or cps or half_noise"):
        transitions(grid, "ddim", 1.0)


def test_a_new_credit_is_one_line(monkeypatch):
    monkeypatch.setitem(CREDITS, "square", lambda step: step.dt.square())
    grid = flow_grid(4)
    steps = transitions(grid, "dance_sde", 0.3)
    weights = target_weights(steps, grid, "square", range(4))
    assert (weights / grid.dt.square()).tolist() == pytest.approx([float(weights[0] / grid.dt[0] ** 2)] * 4)
    assert weights.sum().item() == pytest.approx(sum(step.weight for step in steps))


def test_a_new_objective_is_a_loss_its_flat_region_and_a_line(monkeypatch):
    one_sided = SurrogateLoss(lambda lr, a, xi: -a * lr.clamp(max=xi), lambda lr, a, xi: lr > xi)
    monkeypatch.setitem(OBJECTIVES, "one_sided", one_sided)
    x = torch.tensor([0.05, 0.2], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(OBJECTIVES["one_sided"].loss(x, torch.ones(2), 0.1).sum(), x)
    assert torch.equal(is_clipped(x, torch.ones(2), 0.1, "one_sided"), gradient == 0)
