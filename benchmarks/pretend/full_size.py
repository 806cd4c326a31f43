"""The ready configurations at full size on a pretended GPU: memory by phase beside the estimate, transfers, waits."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from trainer.config.loading import load
from trainer.config.schema import Config
from trainer.loop.align import align
from trainer.memory.estimate import memory
from trainer.policy import loading
from trainer.policy.diffusers_policy import DiffusersPolicy
from trainer.runs import launch

from ..markdown import markdown_table
from ..speed.full_size_models import SHAPES
from .gpu import Traffic
from .models import WHOLE_PIPELINES
from .phases import pretend_run

CONFIGS = Path(__file__).parents[2] / "configs"
SHOWN_PHASES = ("prompts", "decoding", "update")
"""Phases whose memory is shown and estimated."""


@dataclass(frozen=True)
class Case:
    """A ready configuration on a full-size model."""

    kind: str  # of WHOLE_PIPELINES
    config: str  # of configs/
    pixels: int
    gigabytes: int  # the GPU that it should fit


CASES = {
    "sd15-512": Case("sd15", "sd15-ddpo", 512, 8),
    "sdxl-1024": Case("sdxl", "sdxl", 1024, 12),
    "sd35m-512": Case("sd35m", "sd35-flow-grpo", 512, 12),
    "sd35m-1024": Case("sd35m", "sd35-flow-grpo", 1024, 16),
    "flux-512": Case("flux", "flux-dance-24gb", 512, 24),
    "flux-1024": Case("flux", "flux-dance-24gb", 1024, 24),
    "qwen-512": Case("qwen", "qwen-image", 512, 32),
    "z-image-512": Case("z-image", "z-image", 512, 16),
    "z-image-1024": Case("z-image", "z-image", 1024, 24),
    "klein-1024": Case("klein", "flux2-klein", 1024, 24),
    "chroma-512": Case("chroma", "chroma", 512, 16),
}


def case_config(case: Case, folder: Path) -> Config:
    """One update of the fewest images and steps: memory is that of any number of them."""
    given = load(CONFIGS / f"{case.config}.toml", {})
    at_once = given.rollout.images_at_once
    fewest = {
        "model": {"device": "cuda"},
        "prompts": {"lines": ["a fox", "a castle on a hill"], "file": None},
        "rollout": {"prompts_per_update": 1, "group_size": max(2, at_once), "steps": 2, "height": case.pixels,
                    "width": case.pixels},
        "reward": {"weights": {"jpeg_compressibility": 1.0}, "held_out": []},
        "objective": {"train_steps": 1.0, "last_step": False, "kl_every": 1},
        "optimizer": {"minibatches": 1},
        "guard": {"every": 0},  # its images take less memory than the update's
        "run": {"name": case.config, "folder": str(folder), "updates": 1, "preview_every": 0},
    }  # fmt: skip
    return load(CONFIGS / f"{case.config}.toml", fewest)


def pretend_case(name: str) -> dict[str, Any]:
    """One update on the pretended GPU, -> its row."""
    case, start = CASES[name], time.process_time()

    def shapes_only(*_: Any) -> Any:
        return WHOLE_PIPELINES[case.kind]()

    with tempfile.TemporaryDirectory() as folder, patch.object(loading, "load_pipeline", shapes_only):
        config = case_config(case, Path(folder))
        with pretend_run(SHAPES) as gpu:
            run = launch.start_run(config)
            with run:
                for update in align(run.state, run.job):
                    run.keep(update)
        on_cpu = config.model_copy(update={"model": config.model.model_copy(update={"device": "cpu"})})
        estimate = memory(DiffusersPolicy(shapes_only(), on_cpu), config, config.rollout.images_at_once)
    return {
        "name": name,
        "config": case.config,
        "gigabytes": case.gigabytes,
        "peak": gpu.total.peak,
        "estimate": estimate.phases(),
        "phases": {phase: summary(traffic) for phase, traffic in gpu.phases.items()},
        "seconds": round(time.process_time() - start, 1),
    }


def summary(traffic: Traffic) -> dict[str, int]:
    return {
        "calls": traffic.calls,
        "peak": traffic.peak,
        "launches": traffic.launches,
        "casts": traffic.casts,
        "waits": sum(traffic.waits.values()),
        "blocking": sum(traffic.blocking.values()),
        "uploads": traffic.uploads,
        "moved": traffic.moved,
    }


def memory_table(rows: list[dict[str, Any]]) -> str:
    """Peak memory in GB by phase, each beside the estimate."""
    head = ["model", "configuration", *(f"{phase} / estimate" for phase in SHOWN_PHASES), "most", "target"]
    lines = []
    for row in rows:
        peaks = [f"{row['phases'][p]['peak'] / 1e9:.1f} / {row['estimate'][p] / 1e9:.1f}" for p in SHOWN_PHASES]
        lines.append([row["name"], row["config"], *peaks, f"{row['peak'] / 1e9:.1f}", f"{row['gigabytes']} GB"])
    return markdown_table(head, lines)


def beyond_target(rows: list[dict[str, Any]]) -> str:
    """Which models need more memory than they should; empty if none does."""
    return ", ".join(
        f"{row['name']} needs {row['peak'] / 1e9:.1f} GB of {row['gigabytes']} GB"
        for row in rows
        if row["peak"] > 1e9 * row["gigabytes"]
    )
