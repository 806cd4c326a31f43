"""Each sampler step is the Gaussian that its paper writes down."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler  # pyright: ignore[reportPrivateImportUsage]

from comfyui_pcpo.method.ddim_variance import ddim_native_sigma
from comfyui_pcpo.method.samplers import METHODS, default_noise_level, deterministic, transitions
from comfyui_pcpo.method.schedule import ddim_grid, flow_grid, flow_grid_from_sigmas
from comfyui_pcpo.method.surrogate import log_ratio
from comfyui_pcpo.method.transition import Transition, cps, dance_sde, ddim, flow_sde, mean, step

torch.set_num_threads(1)
SHAPE = (2, 3, 4, 4)


def grid_of(method, steps=6):
    return ddim_grid(steps) if method == "ddim" else flow_grid(steps)


def draw(*seeds):
    return [torch.randn(SHAPE, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]


def written_down(method, t, t_next, h, x, out):
    """Mean and std in the papers' own letters, (B, C, H, W)."""
    if method == "ddim":
        sigma = ddim_native_sigma(t, t_next, h)
        x0 = (x - math.sqrt(1 - t) * out) / math.sqrt(t)
        return math.sqrt(t_next) * x0 + math.sqrt(1 - t_next - sigma**2) * out, sigma
    dt, x0, eps = t - t_next, x - t * out, x + (1 - t) * out
    if method == "cps":
        angle = h * math.pi / 2
        return (1 - t_next) * x0 + t_next * math.cos(angle) * eps, t_next * math.sin(angle)
    g = h if method == "dance_sde" else h * math.sqrt(t / (1 - t))
    return x - out * dt - g**2 / (2 * t) * eps * dt, g * math.sqrt(dt)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("i", [1, 3, 4])
def test_every_sampler_is_the_gaussian_its_paper_writes_down(method, i):
    grid, h = grid_of(method), default_noise_level(method)
    tr = transitions(grid, method, h)[i]
    x, out, noise = draw(0, 1, 2)
    t, t_next = grid.levels[i].item(), grid.levels[i + 1].item()
    expected_mean, expected_std = written_down(method, t, t_next, h, x, out)
    assert torch.allclose(mean(x, out, tr), expected_mean, rtol=1e-12, atol=1e-12)
    assert tr.std == pytest.approx(expected_std, rel=1e-12)
    assert torch.equal(step(x, out, noise, tr), mean(x, out, tr) + tr.std * noise)


@pytest.mark.parametrize("method", METHODS)
def test_log_ratio_equals_the_normal_distribution_for_every_sampler_and_step(method):
    for tr in transitions(grid_of(method), method, default_noise_level(method)):
        if tr.std == 0:
            continue
        x, out_old, noise, d = draw(0, 1, 2, 3)
        d = 0.01 * d
        sample = step(x, out_old, noise, tr)
        new, old = (torch.distributions.Normal(mean(x, out, tr), tr.std) for out in (out_old + d, out_old))
        expected = (new.log_prob(sample) - old.log_prob(sample)).flatten(1).mean(1)
        assert torch.allclose(log_ratio(d, noise, tr.weight), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_noise_level_zero_is_the_deterministic_sampler(method):
    grid = grid_of(method)
    steps = transitions(grid, method, 0)
    assert steps == deterministic(grid)
    assert all(tr.std == 0 and tr.weight == math.inf for tr in steps)
    if method == "ddim":
        assert steps == [ddim(a, b, 0.0) for a, b in zip(grid.levels.tolist(), grid.levels[1:].tolist(), strict=False)]
    else:
        assert [(tr.a, tr.b) for tr in steps] == [(1.0, -dt) for dt in grid.dt.tolist()]


@pytest.mark.parametrize("method", ["dance_sde", "flow_sde", "cps"])
def test_a_vanishing_noise_level_tends_to_the_euler_step(method):
    tr = transitions(flow_grid(4), method, 1e-9)[1]
    euler = deterministic(flow_grid(4))[1]
    assert (tr.a, tr.b) == pytest.approx((euler.a, euler.b), abs=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_step_equals_the_diffusers_scheduler(eta):
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        set_alpha_to_one=False, clip_sample=False,
    )  # fmt: skip
    scheduler.set_timesteps(10)
    x, eps, noise = draw(0, 1, 2)
    grid = ddim_grid(10, scheduler.alphas_cumprod)
    for tr, t in zip(transitions(grid, "ddim", eta), scheduler.timesteps, strict=True):
        expected = scheduler.step(eps, int(t), x, eta=eta, variance_noise=noise).prev_sample
        # the scheduler takes its square roots of float32 alphas
        assert torch.allclose(step(x, eps, noise, tr), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["dance_sde", "flow_sde", "cps"])
def test_flow_steps_keep_the_marginals_to_first_order(method):
    # x0 = 0 and x_t = t eps: the exact step has variance t'^2; the SDE discretisations are off by O(dt)
    t, t_next = 0.5, 0.499
    tr = {"dance_sde": dance_sde(t, t_next, 0.3), "flow_sde": flow_sde(t, t_next, 0.7), "cps": cps(t, t_next, 0.7)}
    step_of = tr[method]
    variance = (step_of.a * t + step_of.b) ** 2 + step_of.std**2
    assert variance == pytest.approx(t_next**2, rel=1e-4)


def test_sd15_native_weights_at_50_steps():
    grid = ddim_grid(50)
    weights = [tr.weight for tr in transitions(grid, "ddim", 1.0)]
    times = grid.timesteps.tolist()
    assert sum(weights) / 50 == pytest.approx(0.5169001648, abs=5e-11)
    # the authors' constant; theirs comes from float32 alphas
    assert sum(weights) / 50 == pytest.approx(4.5 / 8.70575076181, rel=1e-6)
    assert min(weights) == pytest.approx(0.3741, abs=5e-5)
    assert times[weights.index(min(weights))] == 441  # between 401 and 461 they differ by 0.001
    assert max(weights) == pytest.approx(3.2748, abs=5e-5)
    assert times[weights.index(max(weights))] == 21
    assert weights[-1] == pytest.approx(1.0032, abs=5e-5)
    assert transitions(grid, "ddim", 1.0)[-1].std == pytest.approx(0.0206, abs=5e-5)


def test_sd15_mean_weight_on_float32_alphas_is_the_authors_constant():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square()
    weights = [tr.weight for tr in transitions(ddim_grid(50, (1 - betas).cumprod(0)), "ddim", 1.0)]
    assert sum(weights) / 50 == pytest.approx(4.5 / 8.70575076181, rel=2e-7)  # float32's own rounding


@pytest.mark.parametrize(("steps", "expected"), [(20, 0.9802), (30, 0.7203), (100, 0.3426), (250, 0.2080)])
def test_sd15_mean_weight_depends_on_the_number_of_steps(steps, expected):
    weights = [tr.weight for tr in transitions(ddim_grid(steps), "ddim", 1.0)]
    assert sum(weights) / steps == pytest.approx(expected, abs=5e-5)


def test_ddim_to_alpha_one_ends_without_noise():
    last = transitions(ddim_grid(50, set_alpha_to_one=True), "ddim", 1.0)[-1]
    assert last.std == 0
    assert last.weight == math.inf


def test_ddim_weight_is_c_over_sigma():
    ab_t, ab_prev, sigma = 0.3, 0.4, 0.2
    a, b = math.sqrt((1 - ab_t) * ab_prev / ab_t), math.sqrt(1 - ab_prev)
    assert ddim(ab_t, ab_prev, sigma).weight == pytest.approx((a - math.sqrt(b**2 - sigma**2)) / sigma, rel=1e-13)


def test_dance_sde_weight_is_the_closed_form():
    t, t_next, eta = 0.6, 0.5, 0.3
    expected = math.sqrt(t - t_next) / eta * (1 + (1 - t) * eta**2 / (2 * t))
    assert dance_sde(t, t_next, eta).weight == pytest.approx(expected, rel=1e-13)


def test_cps_weight_is_the_closed_form_and_its_last_step_has_no_noise():
    t, t_next, h = 0.6, 0.5, 0.7
    cos, sin = math.cos(h * math.pi / 2), math.sin(h * math.pi / 2)
    assert cps(t, t_next, h).weight == pytest.approx(
        (t * (1 - t_next) - (1 - t) * t_next * cos) / (t_next * sin), rel=1e-13
    )
    assert cps(t, 0.0, h).std == 0


def test_flow_sde_takes_the_next_level_in_one_denominator_at_t_one():
    first = transitions(flow_grid(10), "flow_sde", 0.7)[0]
    assert first.weight == pytest.approx(0.051, abs=5e-4)
    t1 = flow_grid(10).levels[1].item()
    assert first == flow_sde(1.0, t1, 0.7)
    assert first.std == pytest.approx(0.7, rel=1e-12)  # g^2 dt = h^2 / (1 - t1) * (1 - t1)
    assert -first.b == pytest.approx(1 - t1, rel=1e-12)  # the 1 - t of the mean stays 0


def test_flow_sde_sum_of_weights_on_the_ideal_grid():
    weights = [tr.weight for tr in transitions(flow_grid(10), "flow_sde", 0.7)]
    assert sum(weights) == pytest.approx(4.2967499433, abs=5e-11)
    assert weights[1] + sum(weights[1:]) == pytest.approx(4.3152134639895925, abs=1e-13)  # the authors' constant


def test_flow_sde_sum_of_weights_on_the_grid_diffusers_uses():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    grid = flow_grid_from_sigmas(scheduler.sigmas)
    weights = [tr.weight for tr in transitions(grid, "flow_sde", 0.7)]
    assert sum(weights) == pytest.approx(5.7053961987, abs=5e-11)
    assert sum(weights[:9]) / grid.dt[:9].sum().item() == pytest.approx(3.9702, abs=5e-5)


def test_half_precision_inputs_step_in_float32():
    x, out, noise = (v.bfloat16() for v in draw(0, 1, 2))
    tr = Transition(1.1, -0.2, 0.3)
    assert step(x, out, noise, tr).dtype == torch.float32
    assert torch.equal(step(x, out, noise, tr), step(x.float(), out.float(), noise.float(), tr))
    assert mean(x.double(), out.double(), tr).dtype == torch.float64


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: transitions(flow_grid(4), "ddim", 1.0), "'ddim' on a flow grid, but that grid takes dance_sde"),
        (lambda: transitions(ddim_grid(4), "cps", 0.7), "'cps' on a ddim grid, but that grid takes ddim"),
        (lambda: transitions(flow_grid(4), "euler", 0.7), "method is 'euler'"),  # type: ignore[arg-type]
        (lambda: transitions(flow_grid(4), "flow_sde", -0.1), "noise_level is -0.1, but flow_sde takes 0 to inf"),
        (lambda: transitions(flow_grid(4), "cps", 1.5), "cps takes 0 to 1. Use 0.7"),
        (lambda: transitions(ddim_grid(4), "ddim", float("nan")), "noise_level is nan"),
        (lambda: transitions(ddim_grid(4), "ddim", 1.0, "half"), "sigma is 'half'"),  # type: ignore[arg-type]
        (lambda: transitions(ddim_grid(4), "ddim", 1.0, "native", 4.5), "'native' has no target"),
        (lambda: transitions(flow_grid(4), "cps", 0.7, "uniform", 4.5), "only ddim solves"),
        (lambda: transitions(ddim_grid(50), "ddim", 0.5, "uniform", 4.5), "noise_level is 0.5, but sigma = 'uniform'"),
        (lambda: ddim(0.5, 0.9, 0.5), "sigma is 0.5, but a DDIM step cannot add more noise"),
    ],
)
def test_transition_errors_name_the_number_and_the_way_out(make, message):
    with pytest.raises(ValueError, match=message):
        make()
