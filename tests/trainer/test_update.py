"""The update: its ratio starts at 1, and its gradient is that of the loss that it reports."""

import math

import pytest
import torch
from update_problem import UpdateProblem

from trainer.config.loading import with_options
from trainer.evaluation.demo import demo_config
from trainer.loop.align import Job, align
from trainer.loop.state import make_training_state
from trainer.policy.loading import make_policy
from trainer.runs.rewards import make_rewards

pytestmark = pytest.mark.slow

SAMPLERS = [("emoji-flow", "flow_sde"), ("emoji-flow", "dance_sde"), ("emoji-flow", "cps"), ("emoji-eps", "ddim")]
XI = 1e-4  # the tightest clip range of the published recipes


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("model", "method"), SAMPLERS)
def test_ratio_is_one_before_the_first_update(make_config, learn, model, method, precision, cfg):
    config = make_config(
        model,
        model={"precision": precision},
        rollout={"method": method, "cfg": cfg, "images_at_once": 1},
        objective={"clip_range": XI, "last_step": method != "cps"},
    )
    _, updates = learn(config)
    for update in updates:  # in the second the LoRA adds something
        assert update.metrics["first_log_ratio_abs_max"] < 0.01 * XI
        assert all(abs(value) < 0.01 * XI for value in update.metrics["per_step"]["log_ratio"])


@pytest.mark.parametrize("extra", ["detach_unconditional", "gradient_checkpointing"])
def test_ratio_is_one_before_the_first_update_with(make_config, learn, model, extra):
    sections = {"detach_unconditional": {"rollout": {extra: True, "cfg": 3.0}}, "gradient_checkpointing": {}}[extra]
    checkpointing = {"gradient_checkpointing": extra == "gradient_checkpointing", "precision": "bfloat16"}
    _, updates = learn(make_config(model, model=checkpointing, objective={"clip_range": XI}, **sections))
    assert max(update.metrics["first_log_ratio_abs_max"] for update in updates) < 0.01 * XI


def test_ratio_leaves_one_after_the_first_optimizer_step(make_config, learn, model):
    config = make_config(model, optimizer={"minibatches": 2, "learning_rate": 1e-2}, run={"updates": 1})
    metrics = next(learn(config)[1]).metrics
    assert metrics["log_ratio_abs_max"] > 100 * max(metrics["first_log_ratio_abs_max"], 1e-12)


@pytest.mark.parametrize("name", ["log_hinge", "ppo", "awm", "nft"])
def test_the_loss_leaves_out_an_image_without_a_score(make_config, name):
    """nft pulls an image of advantage 0 towards the old model; the others have no gradient there anyway."""
    config = make_config(objective={"name": name, "clip_range": 0.9}, optimizer={"max_grad_norm": 1e6})
    problem = UpdateProblem(config)

    def gradient(*scored):
        return torch.cat([g.flatten() for g in problem.gradient(*scored)])

    both, first = gradient((1.0, 0.0)), gradient((1.0, 0.0), (False, True))
    second = gradient((1.0, 0.0), (True, False))
    torch.testing.assert_close(first + second, both)
    assert gradient((1.0, 0.0), (True, True)).count_nonzero() == 0
    assert bool(second.count_nonzero()) == (name == "nft")


@pytest.mark.parametrize(
    ("objective", "kl_weight", "branch"),
    [("matching", 0.0, 0), ("ppo", 0.0, 0), ("matching", 0.3, 0), ("matching", 0.3, 2)],
)
def test_gradient_of_the_update_is_the_slope_of_its_loss(make_config, model, objective, kl_weight, branch):
    """float32 models: outputs are right to 1e-6 of their size and moved by 1e-2 of it, so slopes are to about 1e-3."""
    config = make_config(
        model,
        rollout={"cfg": 1.5, "images_at_once": 2 if branch else 1, "branch": branch},
        objective={"name": objective, "clip_range": 0.9, "kl_weight": kl_weight},
        optimizer={"max_grad_norm": 1e6},
    )
    problem = UpdateProblem(config)
    gradient = problem.gradient()
    size = math.sqrt(sum(g.square().sum().item() for g in gradient))
    noise = problem.direction()
    length = math.sqrt(sum(d.square().sum().item() for d in noise))
    # half along the gradient, so that the slope is not lost in rounding, half anywhere
    direction = [g / size + d / length for g, d in zip(gradient, noise, strict=True)]
    expected = sum((g * d).sum().item() for g, d in zip(gradient, direction, strict=True))
    assert size > 0
    assert problem.slope(direction, 2e-2) == pytest.approx(expected, rel=5e-3)


def test_gradient_steps_of_the_update_sum_to_the_whole(make_config, learn, model):
    """The per-step norms cannot be shorter than the whole gradient, by the triangle inequality."""
    metrics = next(learn(make_config(model, rollout={"steps": 3}))[1]).metrics
    assert len(metrics["per_step"]["grad_norm"]) == 3
    assert sum(metrics["per_step"]["grad_norm"]) >= metrics["grad_norm"] > 0


def test_kl_is_measured_on_exactly_the_wanted_images(make_config, learn):
    """On images of the first minibatch: of each group's four images the first and the third."""
    sections = {"rollout": {"prompts_per_update": 2, "group_size": 4, "images_at_once": 3}}
    found = {}
    for count in (0, 1, 3, 4):
        config = make_config(objective={"kl_images": count, "kl_every": 2}, optimizer={"minibatches": 2}, **sections)
        policy_calls = []
        updates = list(learn(config, tick=lambda calls=policy_calls: calls.append(1))[1])
        first, second = (update.metrics for update in updates)
        assert math.isnan(first["kl"]) and first["model_evaluations"]["reference"] == 0
        assert second["model_evaluations"]["reference"] == 3 * count  # steps
        found[count] = (second["kl"], len(policy_calls))
    assert math.isnan(found[0][0])
    assert found[1][0] > 1e-9
    steps, chunks = 3, {0: 0, 1: 1, 3: 1, 4: 2}  # three images fit in a call
    assert {count: calls - found[0][1] for count, (_, calls) in found.items()} == {
        n: steps * c for n, c in chunks.items()
    }


def test_the_watched_kl_is_that_of_the_lora_that_sampled(make_config, learn):
    """Before the first update the LoRA adds nothing, so whatever the gradient steps do, its KL is 0."""
    config = make_config(
        rollout={"group_size": 4},
        objective={"kl_every": 1},
        optimizer={"minibatches": 2, "epochs": 2, "learning_rate": 0.01},
    )
    first, second = (update.metrics["kl"] for update in learn(config)[1])
    assert first < 1e-11
    assert second > 1e-6


@pytest.mark.parametrize("branch", [pytest.param(0, marks=pytest.mark.thorough), 1])
def test_the_watched_kl_costs_at_most_two_percent_of_an_update(model, learn, tmp_path, branch):
    """On the settings of PCPO's demo, averaged over the updates between two measurements.

    Counted in the model itself.
    """
    demo = demo_config("colorfulness", "run", tmp_path, updates=1, seed=0)
    counts = {}
    for images in (0, demo.objective.kl_images):
        watched = {"kl_weight": 0.0, "kl_images": images, "kl_every": 1}
        sections = {"objective": watched, "rollout": {"branch": branch}}
        config = with_options(demo, {**sections, "model": {"name": model, "device": "cpu"}, "guard": {"every": 0}})
        state, updates = learn(config)
        rows = []
        state.policy.denoiser.register_forward_pre_hook(
            lambda _, args, inputs, rows=rows: rows.append(len((*args, *inputs.values())[0])), with_kwargs=True
        )
        recorded = next(updates).metrics["model_evaluations"]
        assert sum(rows) == sum(recorded.values())
        counts[images] = sum(rows)
    extra = counts[demo.objective.kl_images] - counts[0]
    assert 0 < extra <= 0.02 * demo.objective.kl_every * counts[0]


def test_each_image_is_predicted_once_per_step_of_the_rollout_and_once_per_trained_step(make_config):
    """Counted in the model itself; guidance makes one call of it with two rows for each image."""
    config = make_config(rollout={"group_size": 4, "cfg": 2.0}, objective={"kl_images": 0, "last_step": False})
    policy = make_policy(config)
    rows = {True: 0, False: 0}

    def count(_, args, inputs):
        rows[torch.is_grad_enabled()] += len((*args, *inputs.values())[0])

    policy.denoiser.register_forward_pre_hook(count, with_kwargs=True)
    next(align(make_training_state(policy, config), Job(config, config.prompts.read(), make_rewards(config))))
    assert rows == {False: 2 * 4 * 3, True: 2 * 4 * 2}
