"""The full-size measurements, on small models of the same classes."""

import json

import pytest
import torch

from benchmarks.pretend.full_size import CASES, SHOWN_PHASES, beyond_target, case_config, memory_table
from benchmarks.pretend.full_size import CONFIGS as READY
from benchmarks.speed.full_size import (
    FullSizeOptions,
    estimate_model,
    full_size_table,
    measure_model,
    run_full_size,
)
from benchmarks.speed.full_size_models import PIPELINES
from trainer.config.loading import load
from trainer.config.schema import ConfigError

pytestmark = pytest.mark.slow
CONFIGS = {"sd15-ddpo", "sdxl", "sd35-flow-grpo", "flux-dance-24gb", "qwen-image", "z-image", "flux2-klein", "chroma"}


@pytest.mark.parametrize("name", ["sd15-512", "sdxl-1024", "sd35m-512", "flux-512"])
def test_a_model_is_estimated_without_weights(name):
    row = estimate_model(name, tiny=True)
    assert row["peak"] >= row["denoiser"] + row["lora"] + row["update"] > 0
    assert name in full_size_table([row])


def test_the_estimate_from_shapes_alone_equals_that_of_the_model():
    measured = measure_model("flux-512", "cpu", tiny=True)
    assert measured["estimate"] == estimate_model("flux-512", tiny=True)["peak"]
    assert measured["repeats"] and measured["first_log_ratio"] < 1e-5
    assert measured["seconds"] > 0 and measured["transitions"] == 4 * 3


def test_measuring_one_model_keeps_the_rows_of_others(tmp_path):
    out, said = tmp_path / "rows.jsonl", []
    earlier = [{"name": name, "kind": "measured", "peak": 7e9} for name in ("sd15-512", "flux-512")]
    out.write_text("".join(json.dumps(row) + "\n" for row in earlier))
    run_full_size(FullSizeOptions(tiny=True, device="cpu", only="sd15-512"), out, said.append)
    new, kept = map(json.loads, out.read_text().splitlines())
    assert kept == earlier[1]
    assert new["name"] == "sd15-512" and new["kind"] == "measured" and new["estimate"] > 0 and new["repeats"]
    assert said == [full_size_table([new, kept])]


@pytest.mark.parametrize(
    ("name", "error"), [("sd15-512", "device"), ("no-model", "exited with status 1")], ids=["error", "crash"]
)
def test_a_model_that_fails_is_an_error_after_the_table(tmp_path, name, error):
    out, said = tmp_path / "rows.jsonl", []
    with pytest.raises(ConfigError, match=f"{name} failed"):
        run_full_size(FullSizeOptions(tiny=True, device="no-device", only=name), out, said.append)
    failed = json.loads(out.read_text())
    assert failed["kind"] == "failed" and error in failed["error"] and error in said[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for computers without a GPU")
def test_any_gpu_is_refused_where_there_is_none(tmp_path):
    with pytest.raises(ConfigError, match="device is cuda:1, but PyTorch finds no GPU"):
        run_full_size(FullSizeOptions(device="cuda:1"), tmp_path / "rows.jsonl", print)


def test_a_full_size_sd15_has_its_published_number_of_weights():
    """859.5 million in the UNet, in bfloat16 except the norms."""
    weights = PIPELINES["sd15"](False, True).unet.parameters()
    assert sum(p.numel() * p.element_size() for p in weights) == pytest.approx(2 * 859.5e6, rel=0.01)


def test_a_model_that_exceeds_its_gpu_is_named():
    phase = {"peak": 7.9e9}
    row = {"name": "sd15-512", "config": "sd15-ddpo", "gigabytes": 8, "peak": 7.9e9,
           "phases": dict.fromkeys(SHOWN_PHASES, phase), "estimate": dict.fromkeys(SHOWN_PHASES, 7e9)}  # fmt: skip
    assert beyond_target([row]) == "" and "7.9 / 7.0" in memory_table([row])
    assert beyond_target([row, {**row, "peak": 8.1e9}]) == "sd15-512 needs 8.1 GB of 8 GB"


def test_a_pretended_run_keeps_what_its_configuration_says_of_memory(tmp_path):
    """Only counts and sizes of images change."""
    for case in CASES.values():
        given, used = load(READY / f"{case.config}.toml", {}), case_config(case, tmp_path)
        assert used.model == given.model and used.lora == given.lora
        assert used.rollout.images_at_once == given.rollout.images_at_once
        assert used.optimizer.ema_decay == given.optimizer.ema_decay
        assert (used.rollout.cfg, used.rollout.batch_cfg) == (given.rollout.cfg, given.rollout.batch_cfg)
    assert {case.config for case in CASES.values()} == CONFIGS
