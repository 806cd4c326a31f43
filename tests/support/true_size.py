"""SD1.5 at its true size on the CPU, with random weights: train, resume and export, from a file and from a folder.

    PYTHONPATH=.:tests/support python tests/support/true_size.py FOLDER --rollout.height 64 --rollout.width 64

Further options are those of `train`. The file takes 2 GB of disk, the folder 4 GB, and training 7 GB of memory.
"""

import json
import sys
import time
from pathlib import Path

import diffusers
import original_layout
import torch
import transformers
from safetensors import safe_open

from benchmarks.speed.full_size_models import filled
from trainer.cli.main import main
from trainer.policy.loading import load_pipeline
from trainer.policy.skeletons import CLIP_L, UNET, VAE
from trainer.runs.folder import RunFolder

SMALL = {
    "model.device": "cpu",
    "model.precision": "float32",
    "prompts.lines": "a fox",
    "rollout.prompts-per-update": 1,
    "rollout.group-size": 2,
    "rollout.steps": 2,
    "rollout.cfg": 1.0,
    "reward.weights": "colorfulness",
    "lora.targets": "attention",
    "optimizer.minibatches": 1,
    "run.save-every": 1,
    "run.updates": 1,
}


def random_sd15() -> diffusers.StableDiffusionPipeline:
    """All parts at their true size in float16, as most checkpoints are."""

    def plain(config: dict) -> dict:
        return {k: v for k, v in config.items() if k not in ("_class_name", "architectures", "model_type")}

    def text() -> torch.nn.Module:
        return transformers.CLIPTextModel(transformers.CLIPTextConfig(**plain(CLIP_L)))

    half = torch.float16
    return diffusers.StableDiffusionPipeline(
        vae=filled(lambda: diffusers.AutoencoderKL(**plain(VAE)), False, half), text_encoder=filled(text, False, half),
        unet=filled(lambda: diffusers.UNet2DConditionModel(**plain(UNET)), False, half), tokenizer=None,
        scheduler=None, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def timed(name: str, *command: str) -> None:
    """Run one command of `pcpo` and print its time."""
    start = time.perf_counter()
    status = main([str(part) for part in command])
    sys.stdout.write(f"{name}, {command[0]}: status {status} after {time.perf_counter() - start:.0f} s\n")
    if status:
        raise SystemExit(status)


def use(model: Path, runs: Path, options: list[str]) -> None:
    """One update, a second one after a resume, and an export; print what came out."""
    given = [word for key, value in SMALL.items() for word in (f"--{key}", str(value))]
    name = model.stem + ("-file" if model.is_file() else "-folder")
    run = RunFolder(runs / name)
    timed(name, "train", "--model.name", model, *given, "--run.folder", runs, "--run.name", name, *options)
    timed(name, "resume", run.path, "--updates", "2")
    timed(name, "export", run.path, "--format", "kohya")
    rows = run.records()
    with safe_open(run.path / "lora-kohya.safetensors", "pt") as exported:
        norms = json.dumps([row["grad_norm"] for row in rows])
        sys.stdout.write(f"{name}: {len(exported.keys())} exported tensors, gradient norms {norms}\n")
    assert [row["update"] for row in rows] == [1, 2] and all(row["grad_norm"] > 0 for row in rows)


def run(folder: Path, options: list[str]) -> None:
    file, pipeline_folder = folder / "sd15.safetensors", folder / "sd15"
    if not file.is_file():
        original_layout.write(random_sd15(), file)
    if not pipeline_folder.is_dir():
        load_pipeline(str(file)).save_pretrained(pipeline_folder)
    for model in (file, pipeline_folder):
        use(model, folder, options)


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2:])
