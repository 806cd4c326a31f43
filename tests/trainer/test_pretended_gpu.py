"""Runs on a pretended GPU: everything is where it is needed, little is moved, and the CPU seldom waits.

Tensors on "cuda" have no contents here, so devices, sizes and transfers are tested, and no results.
"""

import os
import subprocess
import sys

import pytest
import tiny_pipelines
import torch
from running import start_run

from benchmarks.pretend.phases import pretend_run
from benchmarks.speed.full_size_models import SHAPES
from comfyui_pcpo.tiny.align import PIXELS
from comfyui_pcpo.tiny.pipelines import EMBEDDED
from trainer.cli.main import main
from trainer.config.loading import dump
from trainer.evaluation.evaluate import evaluate
from trainer.evaluation.images import sample_images
from trainer.evaluation.options import EvaluationOptions, SamplingOptions
from trainer.loop.align import align
from trainer.policy import loading
from trainer.policy.encoded import PROMPTS_AT_ONCE
from trainer.runs import launch

pytestmark = pytest.mark.slow

OFFLOADED = {"precision": "bfloat16", "gradient_checkpointing": True}
RESIDENT = {"precision": "bfloat16", "quantize": "fp8", "offload": False}
FLOAT32 = {"precision": "float32"}
STEPS = 2
TWINS = ("sd21", "sd35", "flux2")  # of the same classes as sd15, sd3 and flux2-klein
GUIDED = ("sd15", "sdxl", "sd3", "qwen-image", "z-image")  # others without, which takes half the time
SIDES = {"qwen-image-2.1": 64, **dict.fromkeys(EMBEDDED, PIXELS)}  # of others it is tiny_pipelines.SIDE
SAMPLED = ("sd15", "flux", "qwen-image", "z-image")  # one of each kind of text inputs
FAMILIES = [name for name in tiny_pipelines.PIPELINES if name not in TWINS]
RUNS = [pytest.param(name, OFFLOADED, id=f"{name}-offloaded") for name in FAMILIES]
RUNS += [pytest.param(n, RESIDENT, id=f"{n}-fp8-resident") for n in FAMILIES]
RUNS += [pytest.param(n, FLOAT32, id=n) for n in EMBEDDED]
FRESH = "PCPO_FRESH_PROCESS"  # set in a process that has computed no gradient before
fresh = pytest.mark.skipif(FRESH not in os.environ, reason="run by test_gradients_in_a_process_of_their_own")


@pytest.fixture
def gpu_config(make_config, tmp_path):
    """gpu_config(family, model, ...): a group of two images on the family's tiny model, with an EMA."""

    def config(family, model, **sections):
        folder = tmp_path / "models" / family
        if family not in EMBEDDED and not folder.is_dir():
            tiny_pipelines.save(family, tmp_path / "models")
        side = dict.fromkeys(("height", "width"), SIDES.get(family, tiny_pipelines.SIDE))
        cfg = {"cfg": 2.0 if family in GUIDED else 1.0}
        return make_config(
            family if family in EMBEDDED else str(folder),
            model={"device": "cuda", **model},
            rollout={"prompts_per_update": 1, "steps": STEPS, "images_at_once": 2, **side, **cfg},
            optimizer={"ema_decay": 0.9, "ema_every": 1},
            objective={"last_step": False, "kl_every": 1},
            lora={"targets": "attention"},
            prompts={"lines": ["a fox", "two frogs"]},
            run={"updates": 1},
            **sections,
        )

    return config


def state_tensors(state):
    """Everything that the optimizer steps change or read."""
    moments = [t for values in state.optimizer.state.values() for t in values.values()]
    return [*state.policy.trainable(), *state.ema.values, *moments]


def ours(places):
    """How many are not within diffusers: Qwen-Image's uploads a text's length, 2.1's looks for the image's tokens."""
    return sum(count for place, count in places.items() if "(in diffusers" not in place)


@pytest.mark.skipif(FRESH in os.environ, reason="is that process")
@pytest.mark.parametrize("runs", ["sd15 or flux-offloaded", pytest.param("not sd15", marks=pytest.mark.thorough)])
def test_gradients_in_a_process_of_their_own(runs):
    """PyTorch counts the devices once, at the first gradient of a process, which has to see the pretended one."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", __file__, "-k", f"continuation and ({runs})"]
    done = subprocess.run(command, env={**os.environ, FRESH: "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]


@fresh
@pytest.mark.parametrize(("family", "model"), RUNS)
def test_a_run_and_its_continuation(family, model, gpu_config):
    with pretend_run() as gpu:
        run = launch.start_run(gpu_config(family, model))
        assert {t.device.type for t in (*run.state.policy.trainable(), *run.state.ema.values)} == {"cuda"}
        with run:
            for update in align(run.state, run.job):
                run.keep(update)
        assert {t.device.type for t in state_tensors(run.state)} == {"cuda"}
        update, rollout, decoding = (gpu.phases[name] for name in ("update", "rollout", "decoding"))
        assert not ours(update.blocking) and update.uploads
        assert ours(gpu.phases["step"].waits) == 0
        assert ours(update.waits) <= 3  # gradient norm and new factors are checked, statistics fetched
        assert ours(rollout.waits) <= STEPS + decoding.calls
        assert sum(gpu.phases["checkpoint"].waits.values()) <= 4  # LoRA, EMA, moments, each in one transfer
        vae = sum(p.nbytes for p in run.state.policy.pipeline.vae.parameters())
        assert decoding.calls == 1 and decoding.moved <= vae * 1.01
    with pretend_run():
        resumed = launch.resume_run(run.folder.path, launch.ResumeOptions(updates=2))
        with resumed:
            assert {t.device.type for t in state_tensors(resumed.state)} == {"cuda"}
            assert [update.number for update in align(resumed.state, resumed.job)] == [2]


@pytest.mark.parametrize("family", SAMPLED)
def test_samples_and_an_evaluation_keep_the_precision(family, gpu_config, monkeypatch):
    read, loaded = loading.load_pipeline, []

    def load_pipeline(name, base, dtype):
        loaded.append(dtype)
        return read(name, base, dtype)

    monkeypatch.setattr(loading, "load_pipeline", load_pipeline)
    config = gpu_config(family, OFFLOADED)
    folder, updates = start_run(config.model_copy(update={"model": config.model.model_copy(update={"device": "cpu"})}))
    list(updates)
    folder.rewrite_config(config)
    with pretend_run() as gpu:
        guide = [f"{folder.path}=1.5", f"{folder.path}=-0.5"]
        options = SamplingOptions(["a fox"], compare=True, guide=guide, steps=STEPS, images=2)
        sample_images(str(folder.path), options)
    assert gpu.phases["prompts"].calls == 2  # with and without the LoRAs
    with pretend_run() as gpu:
        evaluate(str(folder.path), EvaluationOptions(images=2, seeds=1, steps=STEPS))
    assert gpu.phases["prompts"].calls == 1
    assert gpu.phases["decoding"].moved > 0
    assert set(loaded) == {torch.bfloat16}


def test_prompts_are_encoded_some_at_a_time_and_leave_the_gpu(gpu_config):
    peaks = []
    for count in (PROMPTS_AT_ONCE, 5 * PROMPTS_AT_ONCE):
        with pretend_run() as gpu:
            policy = loading.make_policy(gpu_config("flux", FLOAT32))
            encoded = policy.encode([f"fox {n}" for n in range(count)])
            assert encoded.count == count
            assert {v.device.type for v in encoded.positive.values()} == {"cpu"}
            assert {v.device.type for v in encoded.rows([3, 1]).positive.values()} == {"cuda"}
        peaks.append(gpu.phases["prompts"].peak)
    assert peaks[0] == peaks[1]


def test_out_of_memory_names_what_needs_less(gpu_config, tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text(dump(gpu_config("sd15", FLOAT32)))
    weights = sum(p.nbytes for p in tiny_pipelines.build("sd15").unet.parameters())
    with pretend_run(capacity=weights):
        assert main(["train", str(file)]) == 2
    said = capsys.readouterr().err
    assert "out of memory with rollout.images_at_once = 2 at 16 x 16 pixels" in said
    assert "rollout.images_at_once = 1, rollout.batch_cfg = false, model.gradient_checkpointing = true" in said
    assert "model.offload" not in said and "Traceback" not in said
    assert "No update was finished: start again with them." in said


def test_an_operation_across_devices_fails_as_on_a_gpu():
    with pretend_run(), pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device="cuda") + torch.ones(2)


def test_the_counter_of_a_model_without_contents_is_moved():
    """PyTorch knows the number of a counter made without contents, as in the batch norm of FLUX.2's VAE."""
    with SHAPES:
        norm = torch.nn.BatchNorm2d(4)
    with pretend_run(SHAPES):
        norm.to("cuda")
        assert norm.num_batches_tracked.device.type == norm.weight.device.type == "cuda"


def test_a_gpu_is_pretended_no_longer_than_it_is_asked_for():
    before = torch.cuda.is_available(), torch.nn.functional.scaled_dot_product_attention, torch.nn.Module._apply
    with pretend_run():
        assert torch.cuda.is_available()
    after = torch.cuda.is_available(), torch.nn.functional.scaled_dot_product_attention, torch.nn.Module._apply
    assert before == after
    w = torch.ones(2, requires_grad=True)
    (w * 3).sum().backward()
    assert w.grad is not None and w.grad.tolist() == [3, 3]
