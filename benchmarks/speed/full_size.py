"""Memory and speed of full-size models with random weights, which need no download.

`python -m benchmarks full-size` measures every model on a GPU, one process each; with `--estimate` it does the
arithmetic of `check` on any computer, without computing anything; `--tiny --device cpu` tries the command on small
models of the same classes.
"""

import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from comfyui_pcpo.durable import write_durably
from trainer.config.loading import build
from trainer.config.schema import Config, ConfigError
from trainer.loop.align import Job, align
from trainer.loop.plan import make_plan
from trainer.loop.state import make_training_state
from trainer.memory.estimate import memory
from trainer.policy.diffusers_policy import DiffusersPolicy
from trainer.runs.rewards import make_rewards
from trainer.runs.rows import finite

from ..markdown import format_list, markdown_table
from ..study.cells import Say
from ..study.files import write_json
from .full_size_models import PIPELINES
from .measuring import device_clock, in_new_process
from .reference_loop import reference_seconds

TWO_PROMPTS = ("a fox", "a castle on a hill")
UPDATES = 3  # the first is a warm-up
FULL_SIZE: dict[str, tuple[str, int, dict[str, Any]]] = {
    # name: (pipeline, pixels, further settings of [model])
    "sd15-512": ("sd15", 512, {}),
    "sdxl-1024": ("sdxl", 1024, {}),
    "sd35m-512": ("sd35m", 512, {}),
    "sd35m-1024": ("sd35m", 1024, {}),
    "flux-512": ("flux", 512, {"quantize": "fp8"}),
    "flux-1024": ("flux", 1024, {"quantize": "fp8"}),
}


@dataclass(frozen=True)
class FullSizeOptions:
    """What to measure, and on what."""

    estimate: bool = False
    tiny: bool = False
    device: str = "cuda"
    only: str | None = None


def full_size_config(name: str, device: str, tiny: bool) -> Config:
    """One image at a time, guidance where the family uses it, LoRA on attention, as in configs/."""
    kind, pixels, more = FULL_SIZE[name]
    side = 16 if tiny else pixels
    tree = {
        "model": {"name": kind, "device": device, "precision": "bfloat16", "gradient_checkpointing": True, **more},
        "prompts": {"lines": list(TWO_PROMPTS)},
        "rollout": {"prompts_per_update": 2, "group_size": 2, "steps": 4, "images_at_once": 1, "height": side,
                    "width": side, "cfg": 1.0 if kind == "flux" else 5.0},
        "reward": {"weights": {"colorfulness": 1.0}},
        "lora": {"rank": 16, "targets": "attention"},
        "optimizer": {"minibatches": 1},
        "run": {"updates": UPDATES},
    }  # fmt: skip
    return build(tree, name)


def estimate_model(name: str, tiny: bool = False) -> dict[str, Any]:
    """Memory of a model, from shapes alone."""
    config = full_size_config(name, "cpu", tiny)
    policy = DiffusersPolicy(PIPELINES[FULL_SIZE[name][0]](tiny, True), config)
    estimated = memory(policy, config, config.rollout.images_at_once)
    return {"name": name, "kind": "estimate", "peak": max(estimated.phases().values()), **vars(estimated)}


def measure_model(name: str, device: str, tiny: bool = False) -> dict[str, Any]:
    """Peak memory, seconds, share of time outside model calls, and whether a second run repeats the first."""
    config = full_size_config(name, device, tiny)
    first, row = timed_run(name, config, tiny)
    again, _ = timed_run(name, config, tiny, updates=1)
    expected = estimate_model(name, tiny)["peak"]
    return row | {
        "estimate": expected,
        "first_log_ratio": max(metrics["first_log_ratio_abs_max"] for metrics in first),
        "repeats": without_seconds(first[0]) == without_seconds(again[0]),
    }


def without_seconds(metrics: dict[str, Any]) -> dict[str, Any]:
    return finite({key: value for key, value in metrics.items() if "seconds" not in key})  # NaN differs from itself


def timed_run(
    name: str, config: Config, tiny: bool, updates: int = UPDATES
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Metrics of a few updates and their cost; each update is followed by the reference loop."""
    torch.manual_seed(0)  # for the weights of the text encoders
    policy = DiffusersPolicy(PIPELINES[FULL_SIZE[name][0]](tiny, False), config)
    job, device = Job(config, list(TWO_PROMPTS), make_rewards(config)), policy.device
    stream = align(make_training_state(policy, config), job)
    rows, seconds, reference = [], [], []
    for number in range(updates):
        start = device_clock(device)
        rows.append(next(stream).metrics)
        seconds.append(device_clock(device) - start)
        if number:
            plan = make_plan(policy, config, job.objective, TWO_PROMPTS, number)
            reference.append(reference_seconds(policy, config, plan))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    ratios = [ours / theirs for ours, theirs in zip(seconds[1:], reference, strict=True)]
    return rows, {
        "name": name,
        "kind": "measured",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "peak": peak,
        "seconds": statistics.median(seconds[1:]) if reference else seconds[0],
        "transitions": config.images_per_update * len(rows[0]["per_step"]["steps"]),
        "overhead": statistics.median(ratios) - 1 if ratios else None,
    }


def write_row(name: str, options: FullSizeOptions, file: Path) -> None:
    """Entry point of a child process; an error becomes its row."""
    try:
        if options.estimate:
            row = estimate_model(name, options.tiny)
        else:
            row = measure_model(name, options.device, options.tiny)
    except (RuntimeError, ValueError) as error:
        row = failed_row(name, str(error)[:300])
    write_json(file, row)


def failed_row(name: str, error: str) -> dict[str, Any]:
    return {"name": name, "kind": "failed", "error": error}


def measured_row(name: str, options: FullSizeOptions) -> dict[str, Any]:
    """The row of one model, from a new process."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        if status := in_new_process(write_row, name, options, file):
            return failed_row(name, f"exited with status {status}")
        return json.loads(file.read_text(encoding="utf-8"))


def full_size_table(rows: list[dict[str, Any]]) -> str:
    head = ["model", "kind", "peak GB", "estimate GB", "s per update", "overhead", "first log-ratio",
            "repeats"]  # fmt: skip

    def gigabytes(row: dict[str, Any], key: str) -> str:
        return f"{row[key] / 1e9:.1f}" if row.get(key) else ""

    lines = []
    for row in rows:
        share = row.get("overhead")
        lines.append([row["name"], row["kind"], gigabytes(row, "peak"), gigabytes(row, "estimate"),
                      f"{row['seconds']:.2f}" if "seconds" in row else row.get("error", ""),
                      "" if share is None else f"{100 * share:.1f} %", str(row.get("first_log_ratio", "")),
                      str(row.get("repeats", ""))])  # fmt: skip
    return markdown_table(head, lines)


def run_full_size(options: FullSizeOptions, out: Path, say: Say) -> None:
    """Measure or estimate the models, one process each, and print a table; `out` keeps the rows of other models.

    Raises ConfigError after the table if a model failed.
    """
    if not options.estimate and options.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"device is {options.device}, but PyTorch finds no GPU. "
            "Use --estimate, or --tiny --device cpu to try the command."
        )
    lines = out.read_text(encoding="utf-8").splitlines() if out.is_file() else []
    rows = {row["name"]: row for row in map(json.loads, lines)}
    names = [options.only] if options.only else list(FULL_SIZE)
    for name in names:
        rows[name] = measured_row(name, options)
        write_durably(out, "".join(json.dumps(row) + "\n" for row in rows.values()).encode())
    say(full_size_table(list(rows.values())))
    if failed := [name for name in names if rows[name]["kind"] == "failed"]:
        raise ConfigError(f"{format_list(failed)} failed. Remove the cause in the table; --only repeats one model.")
