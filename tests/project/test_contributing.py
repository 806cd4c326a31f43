"""The four additions of CONTRIBUTING.md, made to a copy of the code exactly as the page says, work."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ADDITION = re.compile(
    r"\*\*New file\*\* `(?P<file>[^`]+)`:\n\n```python\n(?P<source>.*?)```\n\n"
    r"\*\*New line\*\* in `(?P<table>\w+)`, `(?P<place>[^`]+)`(?:, with its import)?:\n\n```python\n(?P<lines>.*?)```",
    re.DOTALL,
)
MODELS = "comfyui_pcpo/tiny/models"
TRAIN = (
    *("train", "--prompts.lines", "fox", "--run.name", "added", "--run.updates", "1", "--rollout.steps", "3"),
    *("--rollout.prompts-per-update", "1", "--rollout.group-size", "2", "--rollout.method", "sqrt_sde"),
    *("--reward.weights", "darkness", "--objective.name", "clip_higher"),
)
AURA_FLOW = """
import diffusers, tiny_pipelines, torch
from comfyui_pcpo.method.rollout import GroupNoise, rollout
from comfyui_pcpo.method.samplers import deterministic
from trainer.config.loading import build
from trainer.policy.diffusers_policy import DiffusersPolicy

denoiser = diffusers.AuraFlowTransformer2DModel(
    sample_size=8, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
    num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pos_embed_max_size=64,
)
pipeline = diffusers.AuraFlowPipeline(
    tokenizer=tiny_pipelines.t5_tokenizer(), text_encoder=tiny_pipelines.t5(16), vae=tiny_pipelines.vae(),
    transformer=denoiser, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73),
)
prompts, size = ["a fox", "two stars"], {"height": 16, "width": 16}
policy = DiffusersPolicy(pipeline, build({"rollout": size, "model": {"device": "cpu"}}, "test"))
condition, grid = policy.encode(prompts), policy.grid(3)
noise = GroupNoise([1, 2], 1, policy.latent_shape)
predict = lambda x, t, rows: policy.predict(x, t, condition)
path = rollout(predict, grid, deterministic(grid), noise, [torch.arange(2)])
start = path.latents[0].clone()
plain = pipeline(prompts, num_inference_steps=3, latents=start, guidance_scale=1.0, output_type="latent", **size).images
torch.testing.assert_close(path.final, plain, rtol=1e-4, atol=1e-4)
"""


def add(root: Path, addition: re.Match[str]) -> None:
    """Write the new file, and put its import and its entry where the page says."""
    (root / addition["file"]).write_text(addition["source"])
    place = root / addition["place"]
    text = place.read_text()
    imports = [line for line in addition["lines"].splitlines() if line.startswith("from ")]
    entries = [line for line in addition["lines"].splitlines() if line.startswith("    ")]
    table = re.search(rf"^{addition['table']}\b.*\{{.*\n", text, re.MULTILINE)
    assert table and len(entries) == 1, f"{place} has no table {addition['table']}"
    text = text[: table.end()] + entries[0] + "\n" + text[table.end() :]
    first = re.search(r"^from (?!__future__)", text, re.MULTILINE)
    assert first
    place.write_text(text[: first.start()] + "".join(f"{line}\n" for line in imports) + text[first.start() :])


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of library and trainer with the additions."""
    root = tmp_path_factory.mktemp("extended")
    for package in ("comfyui_pcpo", "trainer"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("models", "__pycache__"))
    shutil.copytree(ROOT / MODELS, root / MODELS)
    additions = list(ADDITION.finditer((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))
    assert [addition["table"] for addition in additions] == ["CLASSES", "SAMPLERS", "OBJECTIVES", "FAMILIES"]
    for addition in additions:
        add(root, addition)
    return root


def run_python(root: Path, *arguments: str) -> None:
    paths = os.pathsep.join([str(root), str(ROOT / "tests" / "support")])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=root, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_run_trains_with_an_added_reward_sampler_and_objective(extended: Path):
    run_python(extended, "-m", "trainer", *TRAIN)
    folder = extended / "output" / "pcpo" / "added"
    (record,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert 0 < record["rewards"]["darkness"] < 1
    assert record["grad_norm"] > 0
    config = (folder / "config.toml").read_text()
    assert 'method = "sqrt_sde"' in config and 'name = "clip_higher"' in config


def test_an_added_family_samples_as_its_pipeline_does(extended: Path):
    run_python(extended, "-c", AURA_FLOW)
