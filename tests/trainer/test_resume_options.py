"""A run that was interrupted ends like one that was not, whatever decides its steps, its loss and its guard."""

from typing import Any

import pytest
import torch
from running import kept

from trainer.config.loading import merge
from trainer.runs import launch

pytestmark = pytest.mark.slow

SMALL = {
    "rollout": {"prompts_per_update": 2, "group_size": 4, "steps": 4},
    "optimizer": {"minibatches": 2},
    "objective": {"last_step": False, "kl_every": 1},
    "run": {"updates": 3, "save_every": 100},
}
GUARD = {"every": 1, "prompts": 2, "images": 2, "tolerance": 100.0}
EMA = {"ema_decay": 0.9, "ema_every": 1}
OPTIONS = {
    "branch": {"rollout": {"branch": 1}},
    "branch points, KL weight": {"rollout": {"branch": 1, "branch_points": 2}, "objective": {"kl_weight": 0.1}},
    "branch, KL budget, guard": {"rollout": {"branch": 2}, "guard": {**GUARD, "kl_budget": 1e-4}},
    "KL mask, epochs": {"objective": {"kl_mask": 1e-5}, "optimizer": {"epochs": 2}},
    "random steps": {"objective": {"train_steps": 0.5}},
    "tempflow": {"objective": {"loss_weight": "tempflow", "credit": "native", "first_steps": 2}},
    "awm": {"objective": {"name": "awm", "shared_noise": True, "levels": 2, "likelihood": "adaptive"}},
    "nft": {
        "objective": {"name": "nft", "shared_noise": True, "level_credit": "proportionate"},
        "rollout": {"policy": "ema"},
        "optimizer": EMA,
    },
    "guard, EMA": {"guard": GUARD, "optimizer": EMA, "reward": {"held_out": ["alignment"]}},
}


def final_state(run: launch.Run) -> tuple[Any, ...]:
    """All that a run ends with, and its rows without their seconds."""
    state = run.state
    ema = None if state.ema is None else (state.ema.steps, list(state.ema.values))
    rows = [{k: v for k, v in row.items() if not k.startswith("seconds_")} for row in run.folder.records()]
    lora, moments = state.policy.lora(), state.optimizer.state_dict()
    return lora, moments, state.window.state_dict(), ema, state.kl_weight, state.done, rows


def same(left: Any, right: Any) -> bool:
    """Equality of trees, bit for bit where they hold tensors."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(value, right[key]) for key, value in left.items())
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return left == right


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_run_interrupted_among_its_gradient_steps_ends_with_the_same_bits(make_config, options):
    common = merge(SMALL, options)
    whole = launch.start_run(make_config(**merge(common, {"run": {"name": "whole"}})))
    list(kept(whole))
    predictions = []

    def stop():
        predictions.append(run.state.done == 1 and torch.is_grad_enabled())
        if sum(predictions) == 3:
            raise KeyboardInterrupt

    run = launch.start_run(make_config(**merge(common, {"run": {"name": "parts"}})), stop)
    with pytest.raises(KeyboardInterrupt):
        list(kept(run))
    assert run.folder.checkpoints.numbers()[-1] == len(run.folder.records()) == 1
    resumed = launch.resume_run(run.folder.path)
    list(kept(resumed))
    for mine, other in zip(final_state(whole), final_state(resumed), strict=True):
        assert same(mine, other)
