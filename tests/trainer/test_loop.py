"""The loop does what the configuration says: which steps, prompts and images are trained, and what stops it."""

import json
import math
from collections import Counter

import pytest
import torch
from running import start_run

from comfyui_pcpo.method.advantage import group_advantage
from comfyui_pcpo.method.rollout import GroupNoise, derive_seed
from comfyui_pcpo.reward.color import Colorfulness
from trainer.cli.progress import NO_SIGNAL, update_line
from trainer.config.schema import ConfigError
from trainer.loop.objectives import make_objective
from trainer.loop.plan import choose_prompts, chunked, make_plan
from trainer.loop.scoring import RunError
from trainer.policy.loading import make_policy
from trainer.runs.folder import RunFolder

KEYS = {
    *("update", "reward_mean", "reward_std", "reward_groups", "rewards", "rewards_std", "held_out", "failed"),
    *("advantage_mean", "advantage_abs_max", "loss", "log_ratio_mean", "log_ratio_abs_max", "first_log_ratio_abs_max"),
    *("clip_fraction", "kl", "grad_norm", "learning_rate", "model_evaluations", "per_step"),
    *("seconds_rollout", "seconds_reward", "seconds_rewards", "seconds_update"),
}
STEP_KEYS = {
    *("steps", "log_ratio", "log_ratio_abs", "clip_fraction", "taylor_error", "kl", "grad_norm"),
    *("std", "weight", "target_weight"),
}


class Failing(Colorfulness):
    """Colourfulness that fails on the images whose index is in `broken`, as NaN or as infinity."""

    def __init__(self, broken, value=math.nan):
        super().__init__()
        self.broken, self.value = broken, value

    def score_batch(self, images, prompts):
        scores = super().score_batch(images, prompts)
        scores[list(self.broken)] = self.value
        return scores


def parameters(state):
    return [p.detach().clone() for p in state.policy.trainable()]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_steps_outside_the_window_are_deterministic_and_not_trained(make_config, model):
    config = make_config(model, rollout={"steps": 6, "sde_window": 2}, objective={"last_step": False})
    policy = make_policy(config)
    starts = set()
    for number in range(1, 30):
        plan = make_plan(policy, config, make_objective(config), ["a fox"], number)
        steps, trained = plan.transitions, plan.trained
        noisy = [i for i, step in enumerate(steps) if step.std > 0]
        assert trained == noisy == [noisy[0], noisy[0] + 1]
        assert 5 not in trained
        starts.add(noisy[0])
    assert starts == {0, 1, 2, 3}


def test_train_steps_picks_that_share_and_every_step_in_turn(make_config):
    config = make_config(rollout={"steps": 9}, objective={"train_steps": 0.5, "last_step": False})
    policy = make_policy(config)
    picks = [make_plan(policy, config, make_objective(config), ["a fox"], n).trained for n in range(1, 40)]
    assert {len(pick) for pick in picks} == {4}
    assert set(Counter(i for pick in picks for i in pick)) == set(range(8))


def test_last_step_is_trained_only_if_asked_for(make_config, model):
    for last, expected in ((True, [0, 1, 2]), (False, [0, 1])):
        config = make_config(model, objective={"last_step": last})
        policy = make_policy(config)
        assert make_plan(policy, config, make_objective(config), ["a fox"], 1).trained == expected


def test_every_prompt_is_seen_equally_often():
    seen = Counter(p for number in range(1, 11) for p in choose_prompts(5, 3, seed=7, number=number))
    assert seen == dict.fromkeys(range(5), 6)


def test_minibatches_cover_every_image_once_and_part_of_every_group(make_config):
    config = make_config(rollout={"group_size": 4, "images_at_once": 3}, optimizer={"minibatches": 2})
    parts = chunked(config, 3)
    rows = [torch.cat(part) for part in parts]
    assert sorted(torch.cat(rows).tolist()) == list(range(12))
    assert all((row // 4).bincount().tolist() == [2, 2, 2] for row in rows)
    assert all(len(chunk) <= 3 for part in parts for chunk in part)


@pytest.mark.parametrize("shared", [True, False])
def test_shared_noise_starts_a_group_from_one_latent(shared):
    first = GroupNoise([derive_seed(0, 1, g) for g in range(2)], 3, (4, 2, 2), shared).first().view(2, 3, -1)
    assert (first[:, 0] == first[:, 1]).all().item() == shared
    assert not torch.equal(first[0], first[1])


def test_shared_noise_changes_the_pictures_of_a_run(make_config, learn):
    pictures = [next(learn(make_config(rollout={"shared_noise": shared}))[1]).images for shared in (True, False)]
    assert not torch.equal(*pictures)


@pytest.mark.parametrize(("minibatches", "epochs"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_an_update_takes_minibatches_times_epochs_optimizer_steps(make_config, learn, minibatches, epochs):
    state, updates = learn(make_config(optimizer={"minibatches": minibatches, "epochs": epochs}))
    next(updates)
    assert {int(moments["step"]) for moments in state.optimizer.state.values()} == {minibatches * epochs}


def test_an_update_trains_the_lora_and_nothing_else(make_config, learn, model):
    state, updates = learn(make_config(model))
    own = {id(p) for p in state.policy.trainable()}
    frozen = [p for p in state.policy.denoiser.parameters() if id(p) not in own]
    before, base = parameters(state), [p.clone() for p in frozen]
    list(updates)
    assert not same(before, parameters(state))
    assert same(base, frozen)


def test_metrics_rows_hold_the_documented_keys_and_no_nan_literals(make_config):
    sections = {"reward": {"held_out": ["jpeg_compressibility"]}, "objective": {"kl_images": 0}}
    folder, updates = start_run(make_config(**sections))
    list(updates)
    text = folder.metrics_file.read_text(encoding="utf-8")
    assert "NaN" not in text
    assert "Infinity" not in text
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["update"] for row in rows] == [1, 2]
    for row in rows:
        assert set(row) == KEYS
        assert set(row["per_step"]) == STEP_KEYS
        assert {len(values) for values in row["per_step"].values()} == {3}
        assert row["kl"] is None
        assert set(row["held_out"]) == {"jpeg_compressibility"}


def test_several_rewards_train_together(make_config, learn):
    _, updates = learn(make_config(reward={"weights": {"colorfulness": 1.0, "jpeg_compressibility": 0.5}}))
    metrics = next(updates).metrics
    parts = metrics["rewards"]
    assert metrics["reward_mean"] == pytest.approx(parts["colorfulness"] + 0.5 * parts["jpeg_compressibility"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_failed_samples_train_nothing(make_config, learn, value):
    """One group, whose fourth image failed: it has no part in the gradient, and none in the others' advantages."""
    sections = {"rollout": {"group_size": 4}, "run": {"updates": 1}}
    state, updates = learn(make_config(**sections), rewards={"colorfulness": Failing({3}, value)})
    metrics = next(updates).metrics
    assert metrics["failed"] == 1 and metrics["advantage_mean"] == pytest.approx(0, abs=1e-6)
    scores = Colorfulness().score(next(learn(make_config(**sections))[1]).images[:3], [""] * 3)
    assert metrics["reward_mean"] == pytest.approx(float(scores.mean()), rel=1e-4)
    assert metrics["advantage_abs_max"] == pytest.approx(float(group_advantage(scores[None]).abs().max()), rel=1e-3)
    assert all(p.isfinite().all() for p in parameters(state))
    assert math.isfinite(metrics["reward_mean"])


class Flat(Colorfulness):
    """Scores every image alike."""

    def score_batch(self, images, prompts):
        return torch.full((len(images),), 0.5)


def test_the_line_of_an_update_says_when_there_was_nothing_to_learn(make_config, learn):
    flat = next(learn(make_config(), rewards={"colorfulness": Flat()})[1])
    assert flat.metrics["advantage_abs_max"] == 0 == flat.metrics["grad_norm"]
    assert NO_SIGNAL in update_line(flat)
    assert NO_SIGNAL not in update_line(next(learn(make_config())[1]))


@pytest.mark.parametrize("name", ["log_hinge", "nft"])
def test_a_failed_sample_has_no_part_in_later_minibatches_either(make_config, learn, name):
    """Only the second part differs from the model that sampled, and all its images failed."""
    config = make_config(
        rollout={"group_size": 4},
        objective={"name": name},
        optimizer={"minibatches": 2, "weight_decay": 0.0, "beta1": 0.0},
        run={"updates": 1},
    )
    state, updates = learn(config, rewards={"colorfulness": Failing({1, 3})})
    found = []
    step = state.optimizer.step
    state.optimizer.step = lambda: (found.append([p.grad.clone() for p in state.policy.trainable()]), step())
    next(updates)
    first, second = found
    assert any(g.count_nonzero() for g in first) and not any(g.count_nonzero() for g in second)


def test_a_group_of_which_all_but_one_failed_trains_nothing(make_config, learn):
    config = make_config(
        rollout={"group_size": 4}, reward={"max_failed": 0.8}, optimizer={"weight_decay": 0.0}, run={"updates": 1}
    )
    state, updates = learn(config, rewards={"colorfulness": Failing({0, 1, 3})})
    before = parameters(state)
    assert next(updates).metrics["grad_norm"] == 0
    assert same(before, parameters(state))


@pytest.mark.parametrize(("broken", "allowed"), [({0, 1, 2}, 0.5), ({0, 1, 2, 3}, 1.0)])
def test_too_many_failed_samples_stop_the_run_with_the_reason(make_config, learn, broken, allowed):
    config = make_config(rollout={"group_size": 4}, reward={"max_failed": allowed})
    state, updates = learn(config, rewards={"colorfulness": Failing(broken)})
    before = parameters(state)
    rule = "max_failed" if allowed < 1 else "Fix the reward"
    with pytest.raises(RunError, match=f"{25 * len(broken)} % of the colorfulness scores failed.*{rule}"):
        next(updates)
    assert same(before, parameters(state))


def test_finished_updates_are_saved_when_a_reward_stops_the_run(make_config, monkeypatch):
    scored = []

    def score_batch(self, images, prompts):
        scored.append(len(images))
        return torch.full((len(images),), math.nan) if len(scored) == 3 else images.float().flatten(1).mean(1)

    monkeypatch.setattr(Colorfulness, "score_batch", score_batch)
    folder, updates = start_run(make_config(run={"updates": 5, "save_every": 100}))
    with pytest.raises(RunError, match="update 3: 100 %"):
        list(updates)
    assert folder.checkpoints.numbers() == [2]
    assert [row["update"] for row in folder.records()] == [1, 2]


def test_a_gradient_of_nan_stops_before_changing_weights(make_config, learn):
    """A weight of the base turns NaN between the rollout and the update: in the last model call of the second part."""
    calls = []
    config = make_config(optimizer={"minibatches": 2}, objective={"kl_images": 0}, run={"updates": 1})
    state, updates = learn(config, tick=lambda: spoil(state, calls))
    before = parameters(state)
    with pytest.raises(FloatingPointError, match=r"gradient norm is nan in minibatch 2.*undone"):
        next(updates)
    assert same(before, parameters(state))
    assert not state.optimizer.state_dict()["state"]
    assert state.done == 0


def spoil(state, calls, at=12):
    calls.append(1)
    if len(calls) == at:
        with torch.no_grad():
            state.policy.denoiser.proj_out.bias.fill_(math.nan)


def test_a_method_that_does_not_fit_the_model_is_a_configuration_error(make_config, learn):
    with pytest.raises(ConfigError, match="ddim"):
        next(learn(make_config(rollout={"method": "ddim"}))[1])


def test_a_sampler_without_noise_is_refused(make_config, learn, model):
    with pytest.raises(ConfigError, match="none of the 3 steps can be trained"):
        next(learn(make_config(model, rollout={"noise_level": 0.0}))[1])


def test_lora_start_begins_from_that_file(make_config, tmp_path, model):
    """A wider LoRA begun from a file computes what the file's does; the new ranks add nothing yet."""
    folder, updates = start_run(make_config(model, lora={"alpha": 1.0}, optimizer={"learning_rate": 0.05}))
    list(updates)
    trained = make_policy(folder.config())
    trained.load_lora(saved(folder))
    wider = make_policy(
        make_config(model, lora={"rank": 3, "alpha": 6.0, "targets": "linear", "start": str(folder.lora_file)})
    )
    x = torch.randn(1, *wider.latent_shape)
    outs = [policy.predict(x, 500, policy.encode(["a fox"])) for policy in (trained, wider)]
    with torch.no_grad(), wider.reference():
        base = wider.predict(x, 500, wider.encode(["a fox"]))
    assert (outs[0] - base).abs().max() > 1e-3
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-5)
    assert all(down.abs().sum(1).min() > 0 for down, _ in wider.lora().values())


def saved(folder: RunFolder):
    from trainer.policy.lora_pairs import load_pairs

    return load_pairs(folder.checkpoint() / "lora.safetensors")


def test_an_update_that_is_stopped_while_it_is_recorded_was_not_done(make_config, learn, monkeypatch):
    state, updates = learn(make_config(run={"updates": 2}))
    before = parameters(state)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("trainer.loop.align.record", stop)
    with pytest.raises(KeyboardInterrupt):
        next(updates)
    assert state.done == 0
    assert same(before, parameters(state))


def test_prompts_are_encoded_once_per_run(make_config, learn):
    state, updates = learn(make_config())
    encode, calls = state.policy.encode, []

    def counted(prompts, *progress):
        calls.append(list(prompts))
        return encode(prompts, *progress)

    state.policy.encode = counted
    assert len(list(updates)) == 2
    assert calls == [["a fox", "a red star", "two frogs"]]


def test_a_short_window_that_is_not_used_changes_nothing(make_config, learn):
    """advantage.window has no effect with kind = group, so it may be shorter than min_count."""
    plain, short = (next(learn(make_config(advantage={"window": window}))[1]) for window in (32, 8))
    assert plain.metrics["loss"] == short.metrics["loss"]
