"""Seconds and memory of the loop against the plain reference loop, and how they grow."""

import json
import multiprocessing
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from comfyui_pcpo.figure import Line, Panel, figure
from trainer.align import align, make_learner
from trainer.config import Config, build, merge
from trainer.plan import make_plan
from trainer.train import load_rewards, make_policy

from . import reference_loop
from .cell import Say, commit
from .contenders import PROMPTS
from .tables import number, table

REPEATS = 5
BASE = {"prompts_per_update": 2, "group_size": 8, "steps": 8, "images_at_once": 16}
AXES: dict[str, tuple[int, ...]] = {
    "steps": (4, 8, 16),
    "group_size": (4, 8, 16),
    "images_at_once": (4, 8, 16),
    "pixels": (64, 96, 128),
}
LABELS = {
    "steps": "denoising steps",
    "group_size": "images per prompt",
    "images_at_once": "images per model call",
    "pixels": "pixels per side",
}


def config_of(model: str, axis: str, value: int) -> Config:
    size = {"height": value, "width": value} if axis == "pixels" else {axis: value}
    tree = {
        "model": {"name": model},
        "prompts": {"lines": list(PROMPTS)},
        "rollout": {**BASE, **size},
        "reward": {"weights": {"colorfulness": 1.0}},
        "objective": {"kl_images": 0},  # the KL of a few images is watched, not needed; the reference has none
        "optimizer": {"minibatches": 2},
    }
    return build(merge(tree, {"run": {"updates": REPEATS + 1}}), "speed")


def clock(device: torch.device) -> float:
    """Seconds of this process alone on a CPU, so that a busy machine does not count; wall clock on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def measure(config: Config) -> dict[str, float]:
    """Medians over updates, ours and the reference in turn: seconds per image and per transition, peak memory."""
    policy = make_policy(config)
    before = peak(policy.device)
    learner, grid = make_learner(policy, config), policy.grid(config.rollout.steps)
    condition, times = policy.encode(config.prompts.read()), grid.timesteps.tolist()
    groups, images = config.rollout.prompts_per_update, config.images_per_update
    plan = make_plan(policy, config, grid, len(PROMPTS), groups, 1)
    rows = torch.arange(images) // config.rollout.group_size
    optimizer = torch.optim.AdamW(policy.trainable(), lr=1e-9)
    seconds: dict[str, list[float]] = {key: [] for key in ("rollout", "update", "least_rollout", "least_update")}
    updates = align(learner, load_rewards(config), config.prompts.read(), config)
    next(updates)  # the first one warms up
    ours = peak(policy.device)
    for _ in range(REPEATS):
        timed(updates, policy, seconds)
        start = clock(policy.device)
        chunks = [rows[part] for minibatch in plan.minibatches for part in minibatch]
        reference_loop.roll_out(policy, condition, times, chunks)
        seconds["least_rollout"].append(clock(policy.device) - start)
        start = clock(policy.device)
        for minibatch in plan.minibatches:
            parts = [rows[part] for part in minibatch]
            reference_loop.train(policy, optimizer, condition, [times[i] for i in plan.trained], parts)
        seconds["least_update"].append(clock(policy.device) - start)
    found = {key: statistics.median(values) for key, values in seconds.items()}
    return found | {"images": images, "transitions": images * len(plan.trained), "peak": ours, "loaded": before}


def timed(updates: Any, policy: Any, seconds: dict[str, list[float]]) -> None:
    """One update; rollout and update are told apart by the share of the wall clock that each took."""
    start = clock(policy.device)
    metrics = next(updates).metrics
    whole = clock(policy.device) - start
    parts = [metrics[f"seconds_{name}"] for name in ("rollout", "reward", "update")]
    seconds["rollout"].append(whole * parts[0] / sum(parts))
    seconds["update"].append(whole * parts[2] / sum(parts))


def peak(device: torch.device) -> float:
    """The most memory so far, in MB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform == "win32":
        return float("nan")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1e-6 if sys.platform == "darwin" else 1.024e-3)


def child(model: str, axis: str, value: int, file: Path) -> None:
    """One measurement in a process of its own, whose peak memory is then its own too."""
    torch.set_num_threads(1)
    row = {"model": model, "axis": axis, "value": value, **measure(config_of(model, axis, value))}
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(row), encoding="utf-8")
    temporary.replace(file)


def run(out: Path, say: Say, models: tuple[str, ...] = ("emoji-flow", "emoji-eps")) -> None:
    """Every point that is not measured yet, one after another: speed/*.json."""
    folder = out / "speed"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "commit.txt").write_text(commit(), encoding="utf-8")
    for model in models:
        for axis, values in AXES.items():
            for value in values:
                file = folder / f"{model}-{axis}-{value}.json"
                if file.is_file():
                    continue
                process = multiprocessing.get_context("spawn").Process(target=child, args=(model, axis, value, file))
                process.start()
                process.join()
                if not file.is_file():
                    raise RuntimeError(f"speed: {model} with {axis} {value} ended with status {process.exitcode}.")
                say(f"speed: {model}, {axis} {value}")


def outside(row: dict[str, Any], part: str) -> float:
    """Share of a part's seconds that the reference does not need."""
    return 1 - row[f"least_{part}"] / row[part]


def report(out: Path, pictures: Path, where: str) -> str:
    """Table and picture; empty where nothing was measured."""
    folder = out / "speed"
    rows = [json.loads(f.read_text(encoding="utf-8")) for f in sorted(folder.glob("*.json"))]
    if not rows:
        return ""
    rows.sort(key=lambda r: (r["model"] != "emoji-flow", list(AXES).index(r["axis"]), r["value"]))
    growth(rows).save(pictures / "speed.png")
    head = ["", "", "ms per image, rollout", "ms per trained transition", "outside model calls: rollout", "update"]
    lines = [
        [
            row["model"],
            f"{LABELS[row['axis']]} {row['value']}",
            number(1e3 * row["rollout"] / row["images"], 1),
            number(1e3 * row["update"] / row["transitions"], 1),
            f"{100 * outside(row, 'rollout'):.1f} %",
            f"{100 * outside(row, 'update'):.1f} %",
            f"{row['peak']:.0f} MB ({row['peak'] - row['loaded']:+.0f})",
        ]
        for row in rows
    ]
    size = ", ".join(f"{LABELS.get(key, 'prompts')} {value}" for key, value in BASE.items())
    intro = (
        f"At commit {(folder / 'commit.txt').read_text(encoding='utf-8')}, one CPU thread, seconds of the process, "
        f"medians of {REPEATS} updates in turn with `benchmarks/reference_loop.py`, which makes the same model calls "
        f"forward and backward and nothing else. Unless the row says otherwise: {size}, 64 pixels. Memory is the "
        "process's peak after one update, in brackets what the loop adds to the loaded model."
    )
    text = table([*head, "peak memory"], lines)
    return f"## Speed and memory\n\n{intro}\n\n![Speed]({where}/speed.png)\n\n{text}"


def growth(rows: list[dict[str, Any]]) -> Image.Image:
    """Seconds per update, ours and the reference's, along each axis."""
    panels = []
    for axis, label in LABELS.items():
        lines = []
        for color, model in enumerate(("emoji-flow", "emoji-eps")):
            some = [row for row in rows if row["axis"] == axis and row["model"] == model]
            x = [row["value"] for row in some]
            ours = [row["rollout"] + row["update"] for row in some]
            least = [row["least_rollout"] + row["least_update"] for row in some]
            if some:
                lines.append(Line(model, x, ours, style="points", color=color))
                lines.append(Line(f"{model}, model calls alone", x, least, style="dashed", color=color))
        panels.append(Panel(f"Seconds per update by {label}", label, "CPU seconds", lines))
    return figure(panels, columns=2, size=(520, 340))
