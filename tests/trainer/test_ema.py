"""The running average of the LoRA: its formula, and that what is saved and sampled is the average."""

import pytest
import torch
from running import start_run
from safetensors.torch import load_file
from torch import nn

from comfyui_pcpo.lora.formats import parse_state
from trainer.loop.ema import LoraEma
from trainer.policy.diffusers_policy import module_names
from trainer.policy.families import denoiser_of
from trainer.policy.loading import load_pipeline
from trainer.policy.lora_pairs import load_pairs

pytestmark = pytest.mark.slow

EMA = {"optimizer": {"ema_decay": 0.9, "ema_every": 1, "learning_rate": 0.03}}


def test_the_average_by_hand():
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    ema = LoraEma([p], decay=0.25, every=2)
    seen = []
    for value in (1.0, 2.0, 3.0, 4.0):
        p.data.fill_(value)
        ema.step()
        seen.append(ema.values[0].item())
    # after step 2 the decay is min(.25, 3 / 12), after step 4 min(.25, 5 / 14)
    assert seen == [0.0, 1.5, 1.5, 3.375]


def test_early_values_count_less_than_the_decay_says():
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    ema = LoraEma([p], decay=0.9, every=1)
    p.data.fill_(1.0)
    ema.step()
    torch.testing.assert_close(ema.values[0], torch.tensor([9 / 11], dtype=torch.float64))


def test_in_place_swaps_and_gives_back():
    p = nn.Parameter(torch.ones(2))
    ema = LoraEma([p], 0.9, 1)
    p.data.fill_(5.0)
    with ema.in_place():
        assert p.tolist() == [1.0, 1.0]
    assert p.tolist() == [5.0, 5.0]


def test_what_a_run_keeps_is_the_average(make_config, model):
    config = make_config(model, **EMA, run={"updates": 3})
    folder, updates = start_run(config)
    list(updates)
    raw, average = (load_pairs(folder.checkpoint() / f"{name}.safetensors") for name in ("lora", "average"))
    assert any(not torch.equal(raw[name][1], average[name][1]) for name in raw)
    used = folder.lora()
    assert all(torch.equal(used[name][1], average[name][1]) for name in used)
    exported = parse_state(load_file(folder.lora_file), module_names(denoiser_of(load_pipeline(model))))
    assert all(torch.equal(exported[name][1], average[name][1]) for name in used)


def test_the_average_follows_the_formula_over_a_run(make_config, learn):
    state, updates = learn(make_config("emoji-flow", **EMA, run={"updates": 3}))
    expected = [p.detach().clone() for p in state.policy.trainable()]
    for n, _ in enumerate(updates, 1):
        decay = (1 + n) / (10 + n)
        expected = [
            decay * e + (1 - decay) * p.detach() for e, p in zip(expected, state.policy.trainable(), strict=True)
        ]
    for value, e in zip(state.ema.values, expected, strict=True):
        torch.testing.assert_close(value, e)
