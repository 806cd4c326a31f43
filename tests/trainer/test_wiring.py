"""What is configured reaches the update: credit, seeds, prompts, and every setting of the loss and the optimizer."""

import pytest
import torch
from update_problem import UpdateProblem

from comfyui_pcpo.method.rollout import GroupNoise, derive_seed, rollout
from comfyui_pcpo.reward import Reward
from trainer.loop.align import Job, align
from trainer.loop.distributed import Processes
from trainer.loop.objectives import OnForwardProcess, Terms
from trainer.loop.optimizer import make_optimizer
from trainer.loop.plan import choose_prompts, make_plan
from trainer.loop.state import make_training_state
from trainer.loop.statistics import StepStatistics
from trainer.policy.loading import make_policy
from trainer.runs.rewards import make_rewards

XI = 0.1


class PromptNumber(Reward):
    """The number that a prompt ends with."""

    name = "number"

    def score_batch(self, images, prompts):
        return torch.tensor([float(prompt.split()[-1]) for prompt in prompts])


@pytest.mark.slow
@pytest.mark.parametrize("credit", ["native", "proportionate", "guard_dt"])
def test_the_loss_is_the_mean_of_the_terms_under_the_configured_credit_and_weight(make_config, model, credit):
    """Each term by hand from the stored step; the factor outside the clip differs from step to step too."""
    objective = {"name": "matching", "credit": credit, "form": "linear", "loss_weight": "tempflow", "clip_range": XI}
    problem = UpdateProblem(make_config(model, objective={**objective, "kl_images": 0}))
    steps, path, found, advantage = problem.plan.transitions, problem.path, problem.run(0.0), torch.tensor([1.0, -0.5])
    std, native, size = (torch.tensor(q) for q in zip(*((s.std, s.weight, abs(s.b)) for s in steps), strict=True))
    shape = {"native": native, "proportionate": problem.plan.grid.dt, "guard_dt": size / problem.plan.grid.dt}[credit]
    weights, terms, ratios = shape * native.sum() / shape.sum(), [], []
    with torch.no_grad():
        for i, time in enumerate(path.timesteps):
            d = problem.predict(path.latents[i], time, torch.arange(2)) - path.outs[i]
            ratio = -(float(weights[i]) * d * path.noises[i]).flatten(1).mean(1)
            terms.append(std[i] / std.mean() * (XI * advantage.abs() - advantage * ratio))
            ratios.append(float(ratio.mean()))
    assert found.loss == pytest.approx(float(torch.stack(terms).mean()), rel=1e-4)
    assert found.per_step()["log_ratio"] == pytest.approx(ratios, rel=1e-3, abs=1e-8)


@pytest.mark.slow
def test_the_seed_decides_noise_prompts_and_the_lora(make_config, learn):
    lines = {"lines": [f"a fox {n}" for n in range(20)]}

    def first(seed):
        state, updates = learn(make_config(prompts=lines, run={"seed": seed, "updates": 1}))
        return torch.cat([p.detach().flatten() for p in state.policy.trainable()]), next(updates)

    (lora, one), (other, two) = first(1), first(2)
    assert not torch.equal(lora, other) and not torch.equal(one.images, two.images) and one.prompts != two.prompts


def test_prompts_come_in_another_order_in_every_pass_and_with_every_seed():
    passes = [choose_prompts(8, 8, seed, number) for seed, number in ((0, 1), (0, 2), (1, 1))]
    assert all(sorted(order) == list(range(8)) for order in passes)
    assert len({tuple(order) for order in passes}) == 3


@pytest.mark.parametrize(
    ("rollout", "objective"),
    [({"sde_window": 1}, {}), ({}, {"train_steps": 0.25}), ({"branch": 1}, {}), ({}, {"name": "nft", "levels": 2})],
)
def test_the_seed_decides_which_steps_are_trained(make_config, rollout, objective):
    policy, drawn = None, set()
    for seed in range(6):
        config = make_config(rollout={"steps": 8, **rollout}, objective=objective, run={"seed": seed})
        policy = policy or make_policy(config)
        plan = make_plan(policy, config, Job(config, ["a fox"], {}).objective, ["a fox"], 1)
        drawn.add((*plan.trained, *(t.std > 0 for t in plan.transitions)))
    assert len(drawn) > 1


def test_stratified_levels_weigh_in_the_loss(make_config):
    config = make_config(rollout={"steps": 7}, objective={"name": "nft", "levels": 2})
    plan = make_plan(make_policy(config), config, Job(config, ["a fox"], {}).objective, ["a fox"], 1)
    weights = [float(plan.loss_weights[i]) for i in plan.trained]
    assert len(weights) == 2 and weights[0] != weights[1]  # strata of 4 and 3 levels


@pytest.mark.slow
def test_every_image_is_of_its_own_prompt_and_scored_with_it(make_config, learn):
    lines = [f"a fox {n}" for n in range(2)]
    config = make_config(
        prompts={"lines": lines}, rollout={"prompts_per_update": 2}, objective={"name": "nft"}, run={"updates": 1}
    )
    state, updates = learn(config, rewards={"colorfulness": PromptNumber()})
    plan = make_plan(state.policy, config, Job(config, lines, {}).objective, lines, 1)
    images = []
    for group, prompt in enumerate(plan.prompts):
        condition = state.policy.encode([prompt])
        noise = GroupNoise([derive_seed(config.run.seed, 1, group)], 2, state.policy.latent_shape)

        def predict(x, time, rows, condition=condition):
            return state.policy.predict(x, time, condition.rows([0] * len(rows)))

        with torch.no_grad():
            path = rollout(predict, plan.grid, plan.transitions, noise, [torch.arange(2)])
            images.append(state.policy.decode(path.final))
    update = next(updates)
    torch.testing.assert_close(update.images, torch.cat(images), rtol=0, atol=1e-3)
    assert update.scores.tolist() == [float(prompt.split()[-1]) for prompt in update.prompts]


class Noted(OnForwardProcess):
    """Notes the latents that it noises and those that it makes of them."""

    def prepare(self, path, plan, noise, predict):
        prepared = super().prepare(path, plan, noise, predict)
        self.seen.append((path.final, prepared.latents))
        return prepared


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_the_noise_of_the_levels_is_not_the_rollouts_and_is_shared_where_that_is_wanted(make_config, shared):
    config = make_config(objective={"name": "nft", "shared_noise": shared}, run={"updates": 1})
    state = make_training_state(make_policy(config), config)
    job, objective = Job(config, ["a fox"], make_rewards(config)), Noted(config.objective, config.advantage)
    object.__setattr__(objective, "seen", [])
    vars(job)["objective"] = objective
    next(align(state, job))
    ((final, latents),) = objective.seen
    plan = make_plan(state.policy, config, job.objective, ["a fox"], 1)
    level = float(plan.grid.levels[0])  # 1, pure noise, is the first level of a flow model
    noise = (latents[0] - (1 - level) * final) / level
    first = plan.noise(config.run.seed, state.policy.latent_shape).next()
    assert torch.equal(noise[0], noise[1]) == shared
    assert not torch.allclose(noise, first, atol=1e-3)


SETTINGS = [
    ({"name": "nft"}, "objective", "nft_beta", 0.3, 1.0),
    ({"name": "nft"}, "objective", "shared_noise", True, False),
    ({"name": "nft"}, "objective", "level_credit", "uniform", "proportionate"),
    ({"name": "nft"}, "advantage", "clip", 0.2, 5.0),
    ({"name": "awm"}, "objective", "likelihood", "uniform", "adaptive"),
    ({"name": "log_hinge"}, "advantage", "spread", "group", "batch"),
    ({"name": "log_hinge"}, "objective", "clip_range", 1e-6, 1e-1),
    ({"name": "log_hinge"}, "objective", "kl_weight", 0.0, 10.0),
    ({"name": "ppo", "form": "scale"}, "objective", "credit", "native", "uniform"),
    ({"name": "ppo"}, "objective", "form", "exact", "linear"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "section", "setting", "one", "other"), SETTINGS)
def test_a_setting_changes_what_is_learned(make_config, learn, objective, section, setting, one, other):
    def learned(value):
        sections = {"objective": objective, "advantage": {}}
        sections[section] = {**sections[section], setting: value}
        config = make_config(
            rollout={"prompts_per_update": 2}, optimizer={"learning_rate": 0.01, "minibatches": 2}, **sections
        )
        return [(update.metrics["loss"], update.metrics["grad_norm"]) for update in learn(config)[1]]

    assert learned(one) == learned(one)
    assert learned(one) != learned(other)


@pytest.mark.slow
def test_advantages_are_clipped_and_gradients_are_at_most_as_long_as_configured(make_config, learn):
    (update, *_) = learn(make_config(advantage={"clip": 0.3}, run={"updates": 1}))[1]
    assert update.metrics["advantage_abs_max"] == pytest.approx(0.3)
    problem = UpdateProblem(make_config(optimizer={"max_grad_norm": 1e-6}, objective={"clip_range": 0.9}))
    length = torch.cat([g.flatten() for g in problem.gradient()]).norm()
    assert float(length) == pytest.approx(1e-6, rel=0.1)


def test_the_optimizer_has_the_configured_settings(make_config):
    settings = {"learning_rate": 3e-4, "beta1": 0.8, "beta2": 0.95, "weight_decay": 0.07}
    (group,) = make_optimizer(
        [torch.nn.Parameter(torch.ones(1))], make_config(optimizer=settings).optimizer
    ).param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (3e-4, (0.8, 0.95), 0.07)


def test_statistics_by_hand():
    """Two chunks of one step; of the second no KL is measured."""
    statistics = StepStatistics([4])
    ratio, clipped = torch.tensor([0.1, -0.3]), torch.tensor([True, False])
    statistics.add(0, True, Terms(ratio, torch.zeros(2), clipped), torch.tensor([0.2, 0.4]), torch.tensor(0.25))
    later = Terms(torch.tensor([0.5]), torch.zeros(1), torch.tensor([False]))
    statistics.add(0, False, later, torch.zeros(0), torch.tensor(0.5))
    statistics.step_norms.append(torch.tensor(3.0))
    statistics.norms.append(torch.tensor(2.0))
    statistics.settle(Processes())
    means = {"log_ratio": 0.1, "log_ratio_abs": 0.3, "clip_fraction": 1 / 3, "kl": 0.3, "grad_norm": 3.0}
    taylor = sum(abs(x.exp() - 1 - x) for x in torch.tensor([0.1, -0.3, 0.5])) / 3
    assert {key: value[0] for key, value in statistics.per_step().items()} == pytest.approx(
        {**means, "taylor_error": float(taylor)}, rel=1e-5
    )
    assert statistics.overall() == pytest.approx(
        {"loss": 0.75, "log_ratio_mean": 0.1, "log_ratio_abs_max": 0.5, "first_log_ratio_abs_max": 0.3,
         "clip_fraction": 1 / 3, "kl": 0.3, "grad_norm": 2.0}, rel=1e-5
    )  # fmt: skip


@pytest.mark.slow
def test_the_only_trained_step_has_the_whole_gradient(make_config, learn):
    (update, *_) = learn(make_config(rollout={"branch": 1, "steps": 4}, run={"updates": 1}))[1]
    assert update.metrics["per_step"]["grad_norm"] == pytest.approx([update.metrics["grad_norm"]])


@pytest.mark.slow
def test_the_reward_is_recorded_as_it_is_weighted(make_config, learn):
    weights = {"colorfulness": 3.0, "redness": 1.0}
    (update, *_) = learn(make_config(reward={"weights": weights}, run={"updates": 1}))[1]
    metrics = update.metrics
    means = metrics["rewards"]
    assert metrics["reward_mean"] == pytest.approx(3 * means["colorfulness"] + means["redness"], rel=1e-5)
    rewards = make_rewards(make_config(reward={"weights": weights}))
    raw = sum(weight * rewards[name].score(update.images, update.prompts) for name, weight in weights.items())
    assert metrics["reward_std"] == pytest.approx(float(raw.std(correction=0)), rel=1e-4)


@pytest.mark.slow
def test_an_undone_update_leaves_the_adapted_kl_weight(make_config):
    config = make_config(guard={"kl_budget": 1e-6, "kl_start": 0.1})
    state = make_training_state(make_policy(config), config)
    before = state.kl_weight
    with pytest.raises(KeyboardInterrupt), state.all_or_nothing():
        state.kl_weight = 5.0
        raise KeyboardInterrupt
    assert state.kl_weight == before != 5.0
