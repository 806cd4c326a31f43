"""Objectives on the forward process: hand values, gradients, and an update that trains both models with them."""

import math

import pytest
import torch
from torch import distributions

from comfyui_pcpo.method.forward_process import (
    FORWARD_OBJECTIVES,
    LIKELIHOODS,
    ForwardSettings,
    adaptive_log_ratio,
    adaptive_weight,
    image_scale,
    matching_log_ratio,
    nft,
    noised,
    output_distance,
    predicted_x0,
    scales,
    target,
)
from comfyui_pcpo.method.rollout import GroupNoise
from comfyui_pcpo.method.schedule import ddim_grid, flow_grid
from comfyui_pcpo.method.surrogate import ppo
from trainer.loop.objectives import make_objective
from trainer.loop.plan import make_plan
from trainer.policy.loading import make_policy

GRIDS = {"flow": flow_grid(5), "ddim": ddim_grid(5)}
KINDS = tuple(GRIDS)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_the_perfect_answer_leads_back_to_the_sample_and_an_error_is_k_times_that_of_the_image(kind):
    x0, eps, off = draw(2, 3, 2, 2), draw(2, 3, 2, 2, seed=1), draw(2, 3, 2, 2, seed=2)
    for scale in scales(GRIDS[kind]):
        signal, noise = scale
        x, out = noised(x0, eps, scale), target(x0, eps, kind) + off
        predicted = x - noise * out if kind == "flow" else (x - noise * out) / signal
        torch.testing.assert_close(predicted - x0, -image_scale(scale, kind) * off)


@pytest.mark.parametrize("kind", KINDS)
def test_noised_samples_keep_unit_noise_at_the_start_of_the_grid(kind):
    signal, noise = scales(GRIDS[kind])[0]
    assert noise > signal
    assert signal**2 + noise**2 == pytest.approx(1.0) if kind == "ddim" else signal + noise == 1


@pytest.mark.parametrize("kind", ["flow", "ddim"])
def test_the_predicted_clean_latent_inverts_the_noising(kind):
    """A perfect output predicts the latent that was noised, at every level."""
    grid = flow_grid(5) if kind == "flow" else ddim_grid(5)
    x0, eps = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    for scale in scales(grid)[1:]:
        x = noised(x0, eps, scale)
        torch.testing.assert_close(predicted_x0(x, target(x0, eps, grid.kind), scale, grid.kind), x0)


def test_matching_log_ratio_equals_the_normal_distribution():
    """-|out - target|^2 is the log-density of a normal distribution with variance 1/2, up to its constant."""
    out, old, wanted = draw(3, 2, 4, 4), draw(3, 2, 4, 4, seed=1), draw(3, 2, 4, 4, seed=2)
    density = [distributions.Normal(mean, math.sqrt(0.5)).log_prob(wanted).flatten(1).mean(1) for mean in (out, old)]
    torch.testing.assert_close(matching_log_ratio(out - old, old - wanted), density[0] - density[1])


def test_matching_log_ratio_is_exactly_zero_for_an_unchanged_model():
    assert not matching_log_ratio(torch.zeros(2, 1, 2, 2), torch.randn(2, 1, 2, 2)).any()


def test_nft_by_hand_with_both_signs_of_the_advantage():
    """One element: |x0+ - x0|^2 / w+ is the size of x0+ - x0, k |e + beta d| = 2 x 4, and k |e - beta d| = 2 x 2."""
    d, error = torch.full((3, 1, 1, 1), 2.0), torch.full((3, 1, 1, 1), 3.0)
    found = nft(d, error, torch.tensor([5.0, -5.0, 0.0]), k=2.0, bound=5.0, beta=0.5)
    assert found.tolist() == pytest.approx([10 * 8, 10 * 4, 10 * 6])


def test_nft_takes_an_advantage_beyond_its_bound_as_the_bound():
    d, error = draw(2, 1, 2, 2), draw(2, 1, 2, 2, seed=1)
    beyond, at = (nft(d, error, torch.tensor([a, -a]), k=1.0, bound=5.0) for a in (50.0, 5.0))
    torch.testing.assert_close(beyond, at)


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_nft_gradient_is_the_advantage_times_that_of_awm_before_the_first_update(beta):
    """Both push out toward the target where A > 0; nft by k^2 / w of a matching step, w = mean |k e|."""
    error, k = draw(3, 2, 2, 2, seed=1), 0.7
    advantage = torch.tensor([1.5, -0.5, 0.0], dtype=torch.float64)
    slopes = []
    for loss in (
        lambda d: nft(d, error, advantage, k, 5.0, beta),
        lambda d: -advantage * matching_log_ratio(d, error),
    ):
        d = torch.zeros_like(error, requires_grad=True)
        slopes.append(torch.autograd.grad(loss(d).sum(), d)[0])
    weight = k**2 / (k * error.abs().flatten(1).mean(1))
    torch.testing.assert_close(slopes[0], slopes[1] * weight[:, None, None, None])


def test_gradients_equal_finite_differences():
    """nft's weights carry no gradient, so its slope is that of the loss with those weights held still."""
    d, error = draw(2, 1, 2, 2).requires_grad_(), draw(2, 1, 2, 2, seed=1)
    advantage = torch.tensor([1.0, -2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: matching_log_ratio(x, error), d)
    assert torch.autograd.gradcheck(output_distance, d)
    held = [(error + s * d.detach()).abs().flatten(1).mean(1) for s in (1, -1)]
    r = 0.5 + advantage / 10

    def still(x):
        closer, further = ((error + s * x).square().flatten(1).mean(1) / w for s, w in zip((1, -1), held, strict=True))
        return 5 * (r * closer + (1 - r) * further)

    expected = torch.autograd.grad(still(d).sum(), d)[0]
    assert torch.autograd.gradcheck(still, d)
    torch.testing.assert_close(torch.autograd.grad(nft(d, error, advantage, 1.0).sum(), d)[0], expected)


@pytest.mark.parametrize(("beta", "bound"), [(0.0, 5.0), (1.0, -1.0)])
def test_nft_refuses_numbers_that_are_not_positive(beta, bound):
    with pytest.raises(ValueError, match=f"beta is {beta} and bound {bound}"):
        nft(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.zeros(1), 1.0, bound, beta)


def test_everything_is_float32_or_wider():
    low = torch.ones(1, 1, 2, 2, dtype=torch.bfloat16)
    found = (noised(low, low, (0.5, 0.5)), target(low, low, "flow"), matching_log_ratio(low, low), output_distance(low))
    assert {x.dtype for x in (*found, nft(low, low, torch.ones(1), 1.0))} == {torch.float32}


@pytest.mark.slow
def test_the_adaptive_weight_divides_by_the_size_of_the_old_error():
    d, error = draw(3, 2, 4, 4), draw(3, 2, 4, 4, seed=1)
    sizes = error.abs().flatten(1).mean(1)
    torch.testing.assert_close(adaptive_log_ratio(d, error), matching_log_ratio(d, error) / sizes)
    assert not adaptive_log_ratio(torch.zeros_like(d), error).any()
    scaled = adaptive_log_ratio(10 * d, 10 * error)  # a level whose errors are ten times as large
    torch.testing.assert_close(scaled, 10 * adaptive_log_ratio(d, error))
    assert not adaptive_weight(error.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_awm_takes_its_likelihood_from_the_settings(likelihood):
    d, error, a = draw(2, 1, 2, 2), draw(2, 1, 2, 2, seed=1), torch.tensor([1.0, -1.0])
    settings = ForwardSettings(0.1, likelihood=likelihood)
    expected = ppo(LIKELIHOODS[likelihood](d, error), a, 0.1)
    assert torch.equal(FORWARD_OBJECTIVES["awm"].loss(d, error, a, 1.0, settings), expected)


def test_noise_shared_in_a_group_is_one_draw_per_group():
    noise = GroupNoise([1, 2], 3, (2, 2, 2))
    shared = noise.next_shared()
    assert torch.equal(shared[0], shared[2])
    assert torch.equal(shared[3], shared[5])
    assert not torch.equal(shared[0], shared[3])
    assert not torch.equal(noise.next_shared(), shared)


def forward_gradient(shared, seeds):
    """Gradient of -A log rho over a group in the parameter of a toy model out = theta x_t, one per seed."""
    x0 = draw(4, 1, 2, 2, seed=9)
    advantage = torch.tensor([1.5, -0.5, -1.5, 0.5], dtype=torch.float64)
    gradients = []
    for seed in seeds:
        noise = GroupNoise([seed], 4, (1, 2, 2))
        eps = noise.next_shared() if shared else noise.next()
        x = noised(x0, eps, (0.4, 0.6))
        error = 0.3 * x - target(x0, eps, "flow")
        gradients.append((-advantage * -(2 * (x * error)).flatten(1).mean(1)).sum().item())
    return torch.tensor(gradients)


def test_shared_noise_equals_independent_noise_in_expectation_with_less_variance():
    shared, independent = (forward_gradient(s, range(4000)) for s in (True, False))
    error = (shared.var() / 4000 + independent.var() / 4000).sqrt()
    assert abs(shared.mean() - independent.mean()) < 3 * error
    assert error < 0.1 * shared.mean().abs()  # the test can tell
    assert shared.var() < independent.var()


@pytest.mark.parametrize("name", ["awm", "nft"])
def test_forward_objectives_start_from_an_unchanged_model_and_move_it(make_config, learn, model, name):
    sections = {"objective": {"name": name, "clip_range": 0.5}, "optimizer": {"minibatches": 2, "learning_rate": 1e-2}}
    state, updates = learn(make_config(model, **sections))
    before = [p.detach().clone() for p in state.policy.trainable()]
    metrics = next(updates).metrics
    assert metrics["first_log_ratio_abs_max"] == 0
    assert metrics["log_ratio_abs_max"] > 0
    assert metrics["per_step"]["grad_norm"][0] > 0
    assert any(not torch.equal(p, b) for p, b in zip(state.policy.trainable(), before, strict=True))


@pytest.mark.parametrize("name", ["awm", "nft"])
def test_forward_objectives_need_no_noise_in_the_sampler(make_config, learn, model, name):
    config = make_config(
        model, rollout={"noise_level": 0.0}, objective={"name": name, "kl_every": 1}, run={"updates": 1}
    )
    metrics = next(learn(config)[1]).metrics
    assert metrics["per_step"]["std"] == [0, 0, 0]
    assert metrics["grad_norm"] > 0
    assert math.isfinite(metrics["kl"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["awm", "nft"])
def test_forward_objectives_repeat_to_the_bit(make_config, learn, name):
    config = make_config(objective={"name": name})
    first, second = ([update.metrics["loss"] for update in learn(config)[1]] for _ in range(2))
    assert first == second


def test_forward_objectives_train_every_step_and_ignore_credit(make_config):
    config = make_config(rollout={"noise_level": 0.0}, objective={"name": "awm", "credit": "native"})
    policy = make_policy(config)
    assert make_plan(policy, config, make_objective(config), ["a fox"], 1).trained == [0, 1, 2]
    assert make_plan(policy, config, make_objective(config), ["a fox"], 1).steps.weights.tolist() == [1, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["awm", "nft"])
def test_the_loss_of_a_forward_objective_falls_over_the_same_samples(make_config, learn, model, name):
    """The reported loss is the mean over epochs, so going over one rollout six times must bring it down."""
    losses = []
    for epochs in (1, 6):
        config = make_config(
            model,
            rollout={"group_size": 4, "noise_level": 0.0},
            objective={"name": name, "clip_range": 0.9, "kl_images": 0},
            optimizer={"epochs": epochs, "learning_rate": 5e-3},
            run={"updates": 1},
        )
        losses.append(next(learn(config)[1]).metrics["loss"])
    assert losses[1] < losses[0]


@pytest.mark.parametrize("name", ["awm", "nft"])
def test_forward_process_objectives_sample_without_noise_unless_told(make_config, model, name):
    policy = make_policy(make_config(model))

    def stds(**rollout):
        config = make_config(model, objective={"name": name}, rollout=rollout)
        return [step.std for step in make_plan(policy, config, make_objective(config), ["a fox"], 1).transitions]

    assert stds() == [0, 0, 0]
    assert min(stds(noise_level=0.5)[:2]) > 0
