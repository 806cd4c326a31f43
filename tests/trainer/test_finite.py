"""NaN and infinity are named where they arise, and no checkpoint holds them."""

import math

import pytest
import torch
from running import start_run
from safetensors.torch import load_file, save_file

from trainer.config.schema import ConfigError
from trainer.loop.align import align
from trainer.loop.finite import check_gradient, check_parameters
from trainer.loop.scoring import RunError
from trainer.policy.loading import make_policy
from trainer.policy.lora_pairs import padded, read_lora, started
from trainer.runs.folder import RunFolder
from trainer.runs.launch import start_run as launch


@pytest.mark.slow
def test_weights_of_the_model_are_named_not_the_reward(make_config):
    run = launch(make_config())
    with torch.no_grad():
        run.state.policy.denoiser.proj_out.bias.fill_(math.nan)
    message = r"update 1: .* for 2 of 2 images, first at denoising step 1. So it does without the LoRA"
    with pytest.raises(RunError, match=message), run:
        next(align(run.state, run.job))
    assert not run.folder.path.exists()


@pytest.mark.slow
def test_a_lora_that_diverged_is_named_not_the_model(make_config):
    run = launch(make_config())
    with torch.no_grad():
        run.state.policy.trainable()[1].fill_(math.inf)
    with pytest.raises(RunError, match=r"The LoRA has diverged: lower optimizer.learning_rate"), run:
        next(align(run.state, run.job))


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_lora_to_start_from_is_refused_for_its_values(make_config, tmp_path, value):
    folder, updates = start_run(make_config(run={"name": "first", "updates": 1}))
    list(updates)
    tensors = load_file(folder.lora_file)
    name = next(name for name in tensors if "lora_" in name and tensors[name].numel() > 1)
    tensors[name].view(-1)[0] = value
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(ConfigError, match=r"the LoRA holds NaN or infinity in 1 of its \d+ modules, first "):
        make_policy(make_config(lora={"start": str(tmp_path / "bad.safetensors")}))


def test_padding_refuses_infinite_factors():
    good = {"a": (torch.zeros(1, 2), torch.zeros(2, 1))}
    with pytest.raises(ConfigError, match="NaN or infinity in 1 of its 1 modules, first a"):
        padded({"a": (torch.zeros(1, 2), torch.full((2, 1), math.inf))}, good)


def test_a_training_from_a_lora_of_lower_rank_trains_the_other_ranks_and_modules_too():
    fresh = {name: (torch.full((3, 2), 7.0), torch.zeros(2, 3)) for name in ("a", "b")}
    pairs = started({"a": (torch.ones(1, 2), torch.ones(2, 1))}, fresh, scale=2.0)
    assert pairs["a"][0].tolist() == [[1, 1], [7, 7], [7, 7]] and pairs["a"][1].tolist() == [[0.5, 0, 0]] * 2
    assert pairs["b"][0].eq(7).all() and not pairs["b"][1].any()


def test_a_lora_file_without_tensors_is_refused(tmp_path):
    save_file({}, tmp_path / "empty.safetensors", {"pcpo.config": ""})
    with pytest.raises(ConfigError, match="holds no tensors, so it is no LoRA"):
        read_lora(tmp_path / "empty.safetensors")


@pytest.mark.slow
def test_an_optimizer_that_makes_infinite_weights_is_stopped_and_nothing_is_saved(make_config, monkeypatch):
    folder, updates = start_run(make_config(run={"updates": 4, "save_every": 100}))
    next(updates)
    step = torch.optim.AdamW.step

    def overflow(self, *arguments):
        step(self, *arguments)
        with torch.no_grad():
            self.param_groups[0]["params"][0].view(-1)[0] = math.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    with pytest.raises(FloatingPointError, match=r"the optimizer made 1 of the LoRA's \d+ factors NaN or infinite"):
        next(updates)
    assert folder.checkpoints.numbers() == [1]
    assert all(t.isfinite().all() for pair in RunFolder(folder.path).lora().values() for t in pair)


def test_the_checks_pass_finite_values():
    check_gradient(torch.tensor(3.0), 1)
    check_parameters([torch.ones(2), torch.zeros(3, 3)])
    for value in (math.nan, -math.inf):
        with pytest.raises(FloatingPointError, match="1 of the LoRA's 2 factors"):
            check_parameters([torch.ones(2), torch.tensor([0.0, value])])
