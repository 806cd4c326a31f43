"""Grids hold the noise levels that the schedulers really use."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler  # pyright: ignore[reportPrivateImportUsage]

from comfyui_pcpo.method.schedule import (
    Grid,
    ddim_grid,
    flow_grid,
    flow_grid_from_sigmas,
    scaled_linear_alphas,
    shifted,
)

torch.set_num_threads(1)
SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@pytest.mark.parametrize(
    ("steps", "spacing"),
    [*((n, spacing) for n in (1, 4, 20, 30, 48, 50) for spacing in ("leading", "trailing")), (999, "leading")],
)
@pytest.mark.parametrize("to_one", [False, True])
def test_ddim_grid_equals_the_diffusers_scheduler(steps, to_one, spacing):
    scheduler = DDIMScheduler(**SD15, set_alpha_to_one=to_one, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    grid = ddim_grid(steps, set_alpha_to_one=to_one, spacing=spacing)
    assert grid.timesteps.dtype == torch.int64
    assert grid.timesteps.tolist() == scheduler.timesteps.tolist()
    # the scheduler multiplies its alphas in float32
    assert torch.allclose(grid.levels[:-1].float(), scheduler.alphas_cumprod[grid.timesteps], rtol=1e-4)
    previous = int(grid.timesteps[-1]) - 1000 // steps
    final = scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.final_alpha_cumprod
    assert grid.levels[-1].item() == pytest.approx(float(final), rel=1e-4)


def test_ddim_grid_takes_the_alphas_of_a_model():
    alphas = scaled_linear_alphas(10, 0.01, 0.2)
    grid = ddim_grid(5, alphas, num_train=10)
    assert grid.timesteps.tolist() == [9, 7, 5, 3, 1]
    assert grid.levels.tolist() == alphas[[9, 7, 5, 3, 1, 0]].tolist()


def test_no_ddim_step_leads_from_a_level_without_signal():
    alphas = scaled_linear_alphas().index_fill(0, torch.tensor(999), 0)  # zero terminal SNR
    assert ddim_grid(4, alphas).levels.isfinite().all()
    with pytest.raises(ValueError, match=r"alpha_bar is 0 at the first timestep 999 .* timestep_spacing = leading"):
        ddim_grid(4, alphas, spacing="trailing")


def test_ddim_steps_are_even():
    assert ddim_grid(50).dt.tolist() == [1 / 50] * 50


def test_flow_grid_is_the_shifted_line():
    grid = flow_grid(10)
    u = torch.linspace(1, 0, 11, dtype=torch.float64)
    assert grid.steps == 10
    assert torch.equal(grid.levels, 3 * u / (1 + 2 * u))
    assert torch.equal(grid.timesteps, 1000 * grid.levels[:-1])
    assert grid.dt.sum().item() == pytest.approx(1, abs=1e-15)


def test_shift_of_one_changes_nothing():
    u = torch.linspace(1, 0, 5, dtype=torch.float64)
    assert torch.equal(shifted(u, 1.0), u)


def test_flow_grid_from_sigmas_is_what_diffusers_uses():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    grid = flow_grid_from_sigmas(scheduler.sigmas)
    printed = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
    assert grid.levels.tolist() == pytest.approx(printed, abs=5e-5)
    assert torch.allclose(grid.timesteps.float(), scheduler.timesteps)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ddim_grid(0), "steps is 0, but the model has 1000"),
        (lambda: ddim_grid(1001), "steps is 1001"),
        (lambda: ddim_grid(1000), "first timestep is 1000"),
        (lambda: ddim_grid(1000, steps_offset=0), "the last of 1000 timesteps is 0"),
        (lambda: ddim_grid(5, scaled_linear_alphas(10)), "10 entries, but num_train is 1000"),
        (lambda: ddim_grid(4, spacing="linspace"), "spacing is 'linspace', but"),  # type: ignore[arg-type]
        (lambda: flow_grid(0), "at least one step"),
        (lambda: flow_grid(5, shift=0.0), "shift is 0.0"),
        (lambda: flow_grid_from_sigmas([1.0, 0.5]), "Append the trailing 0"),
        (lambda: flow_grid_from_sigmas([0.0]), "at least two levels"),
        (lambda: flow_grid_from_sigmas([0.5, 0.7, 0.0]), "level 1 is 0.7 after 0.5"),
        (lambda: flow_grid_from_sigmas([14.6, 1.0, 0.0]), "levels span 0 to 14.6"),
        (lambda: Grid("ddim", torch.tensor([0.9, 0.5]), torch.tensor([1])), "rise"),
        (lambda: Grid("flow", torch.tensor([1.0, 0.0]), torch.tensor([1, 2])), "one more level"),
        (lambda: Grid("edm", torch.tensor([1.0, 0.0]), torch.tensor([1])), "'ddim' or 'flow'"),  # type: ignore[arg-type]
    ],
)
def test_grid_errors_name_the_number_and_the_rule(make, message):
    with pytest.raises(ValueError, match=message):
        make()
