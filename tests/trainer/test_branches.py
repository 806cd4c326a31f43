"""Branching runs: what is trained, what it costs, that it resumes; and credit that is one constant of a run."""

from pathlib import Path

import pytest
import torch
from running import resume_run, start_run

from trainer.config.loading import build, load
from trainer.config.schema import ConfigError
from trainer.loop.objectives import make_objective
from trainer.loop.plan import make_plan, run_steps
from trainer.policy.loading import make_policy

pytestmark = pytest.mark.slow

SAMPLERS = [("emoji-flow", "flow_sde"), ("emoji-flow", "dance_sde"), ("emoji-flow", "cps"), ("emoji-eps", "ddim")]
LINES = ["a fox", "a red star", "two frogs"]


def branching(make_config, model="emoji-flow", **rollout):
    sections = {"prompts_per_update": 2, "group_size": 4, "steps": 5, "branch": 1, **rollout}
    return make_config(model, rollout=sections, objective={"last_step": False})


def plan_of(config, number=1):
    return make_plan(make_policy(config), config, make_objective(config), LINES, number)


@pytest.mark.parametrize(("model", "method"), SAMPLERS)
def test_ratio_is_one_before_the_first_update_of_a_branch(make_config, learn, model, method):
    for update in learn(branching(make_config, model, method=method))[1]:
        assert update.metrics["first_log_ratio_abs_max"] < 1e-5
        assert len(update.metrics["per_step"]["steps"]) <= 2  # one for each group


def test_a_branch_costs_fewer_model_evaluations_than_a_window_of_the_same_length(make_config, learn):
    branch = next(learn(branching(make_config))[1]).metrics["model_evaluations"]
    window = branching(make_config, branch=0, sde_window=1, shared_noise=True)
    whole = next(learn(window)[1]).metrics["model_evaluations"]
    assert whole == {"rollout": 2 * 4 * 5, "update": 2 * 4, "reference": 0}
    assert branch["update"] == 2  # the images of a group share the latent at their branch step
    assert branch["rollout"] < whole["rollout"]


@pytest.mark.parametrize("name", ["nft", "awm"])
def test_a_window_of_noisy_steps_leaves_the_noise_levels_of_a_forward_objective_alone(make_config, name):
    """Their levels are drawn when an update trains; the sampler's steps, which may all be without noise, are others."""
    configs = [make_config(rollout={"steps": 5, "sde_window": window}, objective={"name": name}) for window in (0, 1)]
    every, window = (plan_of(config).trained for config in configs)
    assert every == window and len(every) > 1


def test_images_of_a_group_differ_by_the_noise_of_their_branch_alone(make_config, learn):
    update = next(learn(branching(make_config))[1])
    first = update.images.view(2, 4, -1)
    assert not torch.equal(first[0, 0], first[0, 1])


def test_groups_of_one_prompt_share_a_trunk(make_config, learn):
    config = branching(make_config, prompts_per_update=4, branch_points=2, steps=8)
    plan = plan_of(config)
    assert [branch.trunk for branch in plan.branches.branches] == [0, 0, 1, 1]
    assert plan.prompts[0] == plan.prompts[1] and plan.prompts[2] == plan.prompts[3]
    assert len({branch.start for branch in plan.branches.branches}) > 1
    assert next(learn(config)[1]).metrics["model_evaluations"]["rollout"] < 4 * 4 * 8


def test_branch_first_keeps_to_the_first_steps(make_config):
    config = branching(make_config, branch_first=2, steps=8)
    assert {b.start for n in range(1, 9) for b in plan_of(config, n).branches.branches} == {0, 1}


def test_a_branching_run_resumes_to_the_same_bits(make_config, model):
    def run(name, updates):
        config = branching(make_config, model)
        config = config.model_copy(update={"run": config.run.model_copy(update={"name": name, "updates": updates})})
        folder, stream = start_run(config)
        list(stream)
        return folder

    whole, half = run("whole", 2), run("half", 1)
    list(resume_run(half.path, updates=2)[2])
    left, right = whole.lora(), half.lora()
    assert all(torch.equal(a, b) for name in left for a, b in zip(left[name], right[name], strict=True))


@pytest.mark.parametrize(
    "rollout", [{"sde_window": 1}, {"sde_window": 2}, {"branch": 1}, {}], ids=["window 1", "window 2", "branch", "all"]
)
def test_credit_is_one_constant_of_a_run(make_config, model, rollout):
    """Whatever an update trains, its steps have the weights of a run that trains them all."""
    everything = plan_of(branching(make_config, model, branch=0)).steps.weights
    plans = [plan_of(branching(make_config, model, **{"branch": 0, **rollout}), number) for number in (1, 2, 3)]
    assert all(torch.equal(plan.steps.weights, everything) for plan in plans)
    share = {"train_steps": 0.4, "last_step": False}
    some = make_config(model, rollout={"steps": 5}, objective=share)
    assert torch.equal(plan_of(some).steps.weights, everything)


def test_credit_of_a_window_of_one_step_is_not_native(make_config):
    plan = plan_of(branching(make_config, branch=0, sde_window=1))
    (step,) = plan.trained
    assert abs(float(plan.steps.weights[step]) / plan.transitions[step].weight - 1) > 0.01


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"objective": {"name": "nft"}, "rollout": {"branch": 1}}, "branch 1 cannot be combined with objective.name"),
        ({"rollout": {"branch": 1, "sde_window": 2}}, "branch 1 cannot be combined with rollout.sde_window"),
        ({"rollout": {"branch_points": 2}}, "needs rollout.branch of 1 or more"),
        ({"rollout": {"branch": 1, "branch_points": 3}}, "not a multiple of rollout.branch_points 3"),
        ({"rollout": {"policy": "ema"}}, "needs optimizer.ema_decay"),
    ],
)
def test_combinations_without_a_meaning_are_refused(sections, message):
    with pytest.raises(ConfigError, match=message):
        build(sections, "test")


def test_a_branch_longer_than_the_trainable_steps_is_refused(make_config):
    with pytest.raises(ConfigError, match=r"rollout\.branch: a branch has 9 stochastic steps"):
        plan_of(branching(make_config, branch=9))


@pytest.mark.parametrize(
    "objective",
    [
        {"kl_mask": 1e-5},
        {"loss_weight": "tempflow", "credit": "native"},
        {"credit": "guard_dt", "form": "linear", "rescale_credit": False},
        {"name": "awm", "shared_noise": True, "levels": 2, "likelihood": "adaptive"},
        {"name": "nft", "shared_noise": True, "level_credit": "proportionate"},
        {"first_steps": 2},
        {"skip_last": 2},
    ],
    ids=lambda section: "-".join(map(str, section)),
)
def test_every_option_of_an_objective_trains(make_config, learn, model, objective):
    state, updates = learn(make_config(model, objective={"last_step": False, **objective}, rollout={"steps": 4}))
    before = [p.detach().clone() for p in state.policy.trainable()]
    for update in updates:
        assert update.metrics["first_log_ratio_abs_max"] < 1e-5
    assert any(not torch.equal(p, b) for p, b in zip(state.policy.trainable(), before, strict=True))


def test_the_kl_mask_keeps_several_epochs_near_the_policy_that_sampled(make_config, learn):
    """Eight passes over one rollout at a high learning rate, with the mask and with one that drops nothing."""

    def trained(bound):
        objective = {"kl_mask": bound, "kl_images": 0}
        optimizer = {"epochs": 8, "learning_rate": 0.02}
        return next(learn(make_config(rollout={"group_size": 4}, objective=objective, optimizer=optimizer))[1]).metrics

    masked, free = trained(1e-5), trained(1e6)
    assert masked["clip_fraction"] > 0 == free["clip_fraction"]
    assert masked["log_ratio_abs_max"] < 0.5 * free["log_ratio_abs_max"]


def test_nft_samples_from_the_slow_average(make_config, learn):
    """With a decay near 1 the sampling LoRA stays fresh, so the second rollout is that of an untrained model."""
    section = {"rollout": {"policy": "ema"}, "objective": {"name": "nft"}}
    optimizer = {"ema_decay": 0.9999, "ema_every": 1000, "learning_rate": 0.05}
    slow = [u.images for u in learn(make_config(optimizer=optimizer, **section))[1]]
    latest = [u.images for u in learn(make_config(optimizer=optimizer, objective={"name": "nft"}))[1]]
    idle = [u.images for u in learn(make_config(optimizer={"learning_rate": 1e-12}, objective={"name": "nft"}))[1]]
    assert torch.equal(slow[1], idle[1])
    assert not torch.equal(slow[1], latest[1])


def test_dancegrpos_configurations_decode_the_prediction():
    configs = (Path(__file__).resolve().parents[2] / "configs").glob("*.toml")
    predicted = {file.stem for file in configs if load(file).rollout.decode == "predicted"}
    assert predicted == {"flux-dance", "flux-dance-24gb"}


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({}, r"cannot be combined with objective.last_step = true: .* decode = final, or objective.last_step = false"),
        (
            {"skip_last": 0, "last_step": False},
            r"cannot be combined with objective.skip_last = 0: .* objective.skip_last = 1",
        ),
    ],
)
def test_a_last_step_whose_noise_is_not_scored_is_not_trained(make_config, objective, message):
    with pytest.raises(ConfigError, match=message):
        make_config(rollout={"decode": "predicted"}, objective=objective)


@pytest.mark.parametrize(
    ("objective", "rollout"),
    [
        ({"skip_last": 1}, {}),
        ({"first_steps": 2}, {}),
        ({"name": "nft"}, {}),
        ({}, {"method": "cps"}),
    ],
)
def test_a_prediction_is_scored_where_the_last_step_has_no_noise_or_is_not_trained(make_config, objective, rollout):
    config = make_config(rollout={"decode": "predicted", **rollout}, objective=objective)
    policy, rules = make_policy(config), make_objective(config)
    steps = run_steps(policy, config, rules)
    assert steps.trainable[-1] < 2 or steps.stochastic[-1].std == 0


def test_decoding_the_prediction_leaves_out_the_noise_of_the_last_step(make_config, learn):
    images = {}
    for decode in ("final", "predicted"):
        rollout = {"method": "dance_sde", "noise_level": 1.0, "decode": decode}
        images[decode] = next(learn(make_config(rollout=rollout, objective={"last_step": False}))[1]).images
    assert not torch.equal(images["final"], images["predicted"])
    still = [next(learn(make_config(objective={"name": "nft"}, rollout={"decode": d}))[1]).images for d in images]
    torch.testing.assert_close(*still, rtol=0, atol=1e-4)  # without noise they are one latent
