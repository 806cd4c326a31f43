"""The memory that `check` names is what PyTorch's allocator hands out."""

import gc
import importlib.util
import json

import pytest
import tiny_pipelines
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from trainer.cli.main import main
from trainer.config.loading import dump
from trainer.memory.estimate import budget, memory, pretends
from trainer.memory.tracker import peak_bytes
from trainer.policy.diffusers_policy import DiffusersPolicy
from trainer.policy.loading import make_policy

pytestmark = pytest.mark.slow

MODELS = [
    {},
    {"precision": "bfloat16"},
    {"precision": "bfloat16", "quantize": "fp8"},
    {"gradient_checkpointing": True},
]


def allocated(compute):
    """The most bytes at a time that the allocator hands out, by PyTorch's own profiler."""
    compute()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        compute()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def update_of(policy, images):
    condition = policy.encode(["a fox"]).rows([0] * images)

    def compute():
        out = policy.predict(torch.zeros(images, *policy.latent_shape), 500.0, condition)
        torch.autograd.grad(out.square().mean(), policy.trainable(), allow_unused=True)

    return compute


def test_a_peak_is_what_is_there_at_a_time_without_the_weights():
    layer = nn.Linear(256, 256, bias=False)

    def compute():
        with torch.no_grad():
            for _ in range(3):
                y = layer(torch.zeros(4, 256))
                del y

    assert peak_bytes([layer], compute) == peak_bytes([layer], compute, pretend=False) == 2 * 4 * 256 * 4


@pytest.mark.parametrize("settings", MODELS)
@pytest.mark.parametrize("family", tiny_pipelines.PIPELINES)
def test_the_updates_activations_are_those_that_the_allocator_hands_out(make_config, family, settings):
    pipeline = tiny_pipelines.build(family)
    config = make_config("given", model=settings, rollout={**tiny_pipelines.size(pipeline), "cfg": 2.0})
    policy = DiffusersPolicy(pipeline, config)
    compute = update_of(policy, 2)
    found = peak_bytes([policy.denoiser], compute, pretends(policy))
    assert found == pytest.approx(allocated(compute), rel=0.1 if family in ("flux2", "flux2-klein", "chroma") else 0.05)


@pytest.mark.parametrize("settings", MODELS)
def test_the_estimate_for_an_embedded_model_is_within_15_percent(make_config, model, settings):
    """emoji-eps' convolutions take buffers of their own on a CPU, which are not counted."""
    policy = make_policy(make_config(model, model=settings, rollout={"cfg": 2.0}))
    compute = update_of(policy, 8)
    assert peak_bytes([policy.denoiser], compute) == pytest.approx(allocated(compute), rel=0.15)


def test_nothing_is_computed_and_nothing_changes(make_config):
    policy = make_policy(make_config())
    before = [p.detach().clone() for p in policy.denoiser.parameters()]
    memory(policy, policy.config, 4)
    assert all(torch.equal(p, old) for p, old in zip(policy.denoiser.parameters(), before, strict=True))
    assert all(p.grad is None and type(p) is nn.Parameter for p in policy.trainable())
    with torch.no_grad():
        assert bool(policy.predict(torch.zeros(1, *policy.latent_shape), 500.0, policy.encode(["a"])).isfinite().all())


def test_every_setting_that_saves_memory_shows_in_the_estimate(make_config):
    def found(rollout=None, optimizer=None, ema=0.0, **model):
        config = make_config(
            "emoji-flow",
            model=model,
            rollout={"cfg": 2.0, **(rollout or {})},
            optimizer={"name": "adamw", "ema_decay": ema},
            lora={"rank": 64},
        )
        return memory(make_policy(config), config, 4)

    plain = found()
    assert found(gradient_checkpointing=True).update < plain.update
    assert found({"batch_cfg": False, "detach_unconditional": True}).update < plain.update
    half = found(precision="bfloat16")
    assert half.denoiser < 0.6 * plain.denoiser and half.update < plain.update
    assert found(precision="bfloat16", quantize="int8").denoiser < half.denoiser
    assert found(ema=0.9).lora > plain.lora


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_parts_are_offloaded_from_a_gpu_only(make_config, device):
    policy = make_policy(make_config())

    def found(offload):
        return memory(policy, make_config(model={"device": device, "offload": offload}), 4)

    moved, resident = found(True), found(False)
    if device == "cuda":
        assert moved.phases()["update"] < resident.phases()["update"]
        assert moved.decode < resident.decode and "offloaded to the CPU" in moved.lines()[1]
    else:
        assert moved == resident and not moved.offload


@pytest.mark.parametrize("objective", ["log_hinge", "nft", "awm"])
def test_trajectories_take_the_memory_that_check_counts(make_config, learn, objective):
    """In every model call of two updates: none is kept for longer than it is needed."""
    config = make_config(objective={"name": objective}, rollout={"prompts_per_update": 2, "steps": 4})
    alive = []

    def tick():
        found = (t for t in gc.get_objects() if type(t) is torch.Tensor and t.ndim == 5)  # (T, B, C, H, W)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
        alive.append(sum(storages.values()))

    state, updates = learn(config, tick)
    list(updates)
    assert max(alive) == budget(state.policy, config).trajectory_bytes


def test_check_shows_the_phases_and_their_peak(make_config, tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text(dump(make_config()))
    assert main(["check", str(file)]) == 0
    assert "GiB at most (" in capsys.readouterr().out
    assert main(["check", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["budget"]["memory"]
    assert found["denoiser"] > 0 and found["update"] > 0 and found["text"] > 0 and found["decode"] > 0


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_four_bits_and_the_eight_bit_optimizer_are_estimated_too(make_config):
    config = make_config(model={"quantize": "4bit"}, optimizer={"name": "adamw8bit"}, lora={"rank": 64})
    policy = make_policy(config)
    compute = update_of(policy, 2)
    assert peak_bytes([policy.denoiser], compute, pretends(policy)) == pytest.approx(allocated(compute), rel=0.3)
    plain = make_config(lora={"rank": 64})
    assert memory(policy, config, 2).lora < memory(make_policy(plain), plain, 2).lora
