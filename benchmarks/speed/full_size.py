"""Memory and speed of full-size models with random weights, which need no download.

    python -m benchmarks.speed.full_size                      on a GPU: measured, one process per row
    python -m benchmarks.speed.full_size --estimate           anywhere: the arithmetic of `check`, nothing is computed
    python -m benchmarks.speed.full_size --only flux-512      one row
    python -m benchmarks.speed.full_size --tiny --device cpu  the same path on small stand-ins, to try the command

Writes full_size.jsonl and prints a table.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from trainer.config.loading import build
from trainer.config.schema import Config
from trainer.loop.align import Job, align
from trainer.loop.plan import make_plan
from trainer.loop.state import make_training_state
from trainer.memory.estimate import memory
from trainer.policy.diffusers_policy import DiffusersPolicy
from trainer.runs.rewards import load_rewards

from ..report.tables import table
from . import reference_loop
from .full_size_models import PIPELINES

PROMPTS = ("a fox", "a castle on a hill")
UPDATES = 3  # the first warms up
ROWS: dict[str, tuple[str, int, dict[str, Any], int]] = {
    # name: (pipeline, pixels, more of [model], GB that it should fit)
    "sd15-512": ("sd15", 512, {}, 8),
    "sdxl-1024": ("sdxl", 1024, {}, 16),
    "sd35m-512": ("sd35m", 512, {}, 16),
    "sd35m-1024": ("sd35m", 1024, {}, 16),
    "flux-512": ("flux", 512, {"quantize": "fp8"}, 24),
    "flux-1024": ("flux", 1024, {"quantize": "fp8"}, 24),
}


def config_of(name: str, device: str, tiny: bool) -> Config:
    """One image at a time, guidance where the family uses it, LoRA on attention: what configs/ have."""
    kind, pixels, more, _ = ROWS[name]
    side = 16 if tiny else pixels
    tree = {
        "model": {"name": kind, "device": device, "precision": "bfloat16", "gradient_checkpointing": True, **more},
        "prompts": {"lines": list(PROMPTS)},
        "rollout": {"prompts_per_update": 2, "group_size": 2, "steps": 4, "images_at_once": 1, "height": side,
                    "width": side, "cfg": 1.0 if kind == "flux" else 5.0},
        "reward": {"weights": {"colorfulness": 1.0}},
        "lora": {"rank": 16, "targets": "attention"},
        "optimizer": {"minibatches": 1},
        "run": {"updates": UPDATES},
    }  # fmt: skip
    return build(tree, name)


def estimate(name: str, tiny: bool = False) -> dict[str, Any]:
    """The memory of a row, by shapes alone."""
    config = config_of(name, "cpu", tiny)
    policy = DiffusersPolicy(PIPELINES[ROWS[name][0]](tiny, True), config)
    found = memory(policy, config, config.rollout.images_at_once)
    return {"name": name, "kind": "estimate", "peak": max(found.phases().values()), **vars(found)}


def measure(name: str, device: str, tiny: bool = False) -> dict[str, Any]:
    """Peak memory, seconds, share of the time that is not model calls, and whether a second run repeats the first."""
    config = config_of(name, device, tiny)
    first, row = run(name, config, tiny)
    again, _ = run(name, config, tiny, updates=1)
    expected = estimate(name, tiny)["peak"]
    return row | {
        "estimate": expected,
        "first_log_ratio": max(metrics["first_log_ratio_abs_max"] for metrics in first),
        "repeats": strip(first[0]) == strip(again[0]),
    }


def strip(metrics: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metrics.items() if "seconds" not in key}


def run(name: str, config: Config, tiny: bool, updates: int = UPDATES) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Some updates, -> their metrics and what they took; each is timed beside the reference loop."""
    torch.manual_seed(0)  # of the text encoders' weights
    policy = DiffusersPolicy(PIPELINES[ROWS[name][0]](tiny, False), config)
    job, device = Job(config, list(PROMPTS), load_rewards(config)), policy.device
    stream = align(make_training_state(policy, config), job)
    rows, took, least = [], [], []
    for number in range(updates):
        start = clock(device)
        rows.append(next(stream).metrics)
        took.append(clock(device) - start)
        if number:
            plan = make_plan(policy, config, job.objective, PROMPTS, number)
            least.append(bare(policy, plan, plan.grid.timesteps.tolist(), config))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    ratio = [ours / theirs for ours, theirs in zip(took[1:], least, strict=True)]
    return rows, {
        "name": name,
        "kind": "measured",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "peak": peak,
        "seconds": statistics.median(took[1:]) if least else took[0],
        "transitions": config.images_per_update * len(rows[0]["per_step"]["steps"]),
        "overhead": statistics.median(ratio) - 1 if ratio else None,
    }


def bare(policy: DiffusersPolicy, plan: Any, times: list[float], config: Config) -> float:
    """Seconds of the same model calls and nothing else."""
    condition, owners = policy.encode(list(PROMPTS)), config.rollout.group_size
    chunks = [rows // owners for part in plan.minibatches for rows in part]
    optimizer = torch.optim.SGD(policy.trainable(), lr=0.0)
    start = clock(policy.device)
    reference_loop.roll_out(policy, condition, times, chunks)
    reference_loop.train(policy, optimizer, condition, [times[i] for i in plan.trained], chunks)
    return clock(policy.device) - start


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def child(name: str, options: argparse.Namespace, file: Path) -> None:
    """One row in a process of its own, whose peak is then its own too; a row that fails says why."""
    try:
        row = estimate(name, options.tiny) if options.estimate else measure(name, options.device, options.tiny)
    except (RuntimeError, ValueError) as error:
        row = {"name": name, "kind": "failed", "error": str(error)[:300]}
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")


def show(rows: list[dict[str, Any]]) -> str:
    head = ["model", "kind", "peak GB", "estimate GB", "should fit", "s per update", "overhead", "first log-ratio",
            "repeats"]  # fmt: skip

    def gb(row: dict[str, Any], key: str) -> str:
        return f"{row[key] / 1e9:.1f}" if row.get(key) else ""

    lines = []
    for row in rows:
        share = row.get("overhead")
        lines.append([row["name"], row["kind"], gb(row, "peak"), gb(row, "estimate"), f"{ROWS[row['name']][3]} GB",
                      f"{row['seconds']:.2f}" if "seconds" in row else row.get("error", ""),
                      "" if share is None else f"{100 * share:.1f} %", str(row.get("first_log_ratio", "")),
                      str(row.get("repeats", ""))])  # fmt: skip
    return table(head, lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--estimate", action="store_true", help="the arithmetic only")
    parser.add_argument("--tiny", action="store_true", help="small stand-ins of the same classes")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", choices=[*ROWS], help="one row")
    parser.add_argument("--out", type=Path, default=Path("full_size.jsonl"))
    options = parser.parse_args(arguments)
    if not options.estimate and options.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees 0 GPUs. Use --estimate, or --tiny --device cpu to try the command.")
    options.out.unlink(missing_ok=True)
    for name in [options.only] if options.only else ROWS:
        process = multiprocessing.get_context("spawn").Process(target=child, args=(name, options, options.out))
        process.start()
        process.join()
        if process.exitcode:
            print(f"{name} ended with status {process.exitcode}.")
    print(show([json.loads(line) for line in options.out.read_text(encoding="utf-8").splitlines()]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
