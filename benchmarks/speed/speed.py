"""Seconds and memory of the loop against the plain reference loop, and how they grow."""

import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from comfyui_pcpo.plotting.panels import Line, Panel, draw_panels
from trainer.cli.main import quieten
from trainer.config.loading import build, merge
from trainer.config.schema import Config
from trainer.loop.align import Job, Update, align
from trainer.loop.plan import Plan, make_plan
from trainer.loop.state import make_training_state
from trainer.policy.loading import make_policy
from trainer.runs.rewards import load_rewards

from ..report.tables import number, table
from ..study.cells import Say, commit
from ..study.methods import PROMPTS
from ..study.work import if_free, share
from . import reference_loop

Point = tuple[str, str, int]  # model, axis, its value
REPEATS = 9
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
    loaded = peak(policy.device)
    job = Job(config, config.prompts.read(), load_rewards(config))
    plan = make_plan(policy, config, job.objective, job.prompts, 1)
    updates = align(make_training_state(policy, config), job)
    next(updates)  # the first one warms up
    memory = peak(policy.device)
    rounds = [{**timed(updates, policy.device), **least(policy, config, plan)} for _ in range(REPEATS)]
    found = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
    # a pair of neighbours in time: what slows the machine slows both
    found["outside"] = statistics.median(1 - r["least"] / r["whole"] for r in rounds)
    images = config.images_per_update
    return found | {"images": images, "transitions": images * len(plan.trained), "peak": memory, "loaded": loaded}


def timed(updates: Iterator[Update], device: torch.device) -> dict[str, float]:
    """Seconds of one update; rollout and update are told apart by their shares of the wall clock."""
    start = clock(device)
    metrics = next(updates).metrics
    whole = clock(device) - start
    parts = {name: metrics[f"seconds_{name}"] for name in ("rollout", "reward", "update")}
    total = sum(parts.values())
    return {"whole": whole, "rollout": whole * parts["rollout"] / total, "update": whole * parts["update"] / total}


def least(policy: Any, config: Config, plan: Plan) -> dict[str, float]:
    """Seconds of the reference loop over the same chunks and steps."""
    condition, times = policy.encode(config.prompts.read()), plan.grid.timesteps.tolist()
    rows = torch.arange(config.images_per_update) // config.rollout.group_size
    parts = [[rows[chunk] for chunk in minibatch] for minibatch in plan.minibatches]
    optimizer = torch.optim.SGD(policy.trainable(), lr=0.0)
    start = clock(policy.device)
    reference_loop.roll_out(policy, condition, times, [chunk for part in parts for chunk in part])
    for part in parts:
        reference_loop.train(policy, optimizer, condition, [times[i] for i in plan.trained], part)
    return {"least": clock(policy.device) - start}


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
    quieten()
    torch.set_num_threads(1)
    row = {"model": model, "axis": axis, "value": value, **measure(config_of(model, axis, value))}
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(row), encoding="utf-8")
    temporary.replace(file)


def run(out: Path, say: Say, models: tuple[str, ...] = ("emoji-flow", "emoji-eps")) -> None:
    """Every point that is not measured yet, by one process at a time: two would slow each other. speed/*.json."""
    folder = out / "speed"

    def missing() -> list[Point]:
        points = [(model, axis, value) for model in models for axis, values in AXES.items() for value in values]
        return [point for point in points if not file_of(folder, point).is_file()]

    def job() -> None:
        for point in missing():
            measure_apart(folder, point)
            say("speed: {}, {} {}".format(*point))

    share(lambda: [folder] if missing() else [], lambda place: if_free(place, job))


def file_of(folder: Path, point: Point) -> Path:
    return folder / "{}-{}-{}.json".format(*point)


def measure_apart(folder: Path, point: Point) -> None:
    """One point in a process of its own, and the commit beside it."""
    (folder / "commit.txt").write_text(commit(), encoding="utf-8")
    file = file_of(folder, point)
    process = multiprocessing.get_context("spawn").Process(target=child, args=(*point, file))
    process.start()
    process.join()
    if not file.is_file():
        raise RuntimeError("speed: {} with {} {} ended with status {}.".format(*point, process.exitcode))


def report(out: Path, pictures: Path, where: str) -> str:
    """Table and picture; empty where nothing was measured."""
    folder = out / "speed"
    rows = [json.loads(f.read_text(encoding="utf-8")) for f in sorted(folder.glob("*.json"))]
    if not rows:
        return ""
    rows.sort(key=lambda r: (r["model"] != "emoji-flow", list(AXES).index(r["axis"]), r["value"]))
    growth(rows).save(pictures / "speed.png")
    head = ["", "", "ms per image, rollout", "ms per trained transition", "outside model calls"]
    lines = [
        [
            row["model"],
            f"{LABELS[row['axis']]} {row['value']}",
            number(1e3 * row["rollout"] / row["images"], 1),
            number(1e3 * row["update"] / row["transitions"], 1),
            f"{100 * row['outside']:.1f} %",
            f"{row['peak']:.0f} MB ({row['peak'] - row['loaded']:+.0f})",
        ]
        for row in rows
    ]
    size = ", ".join(f"{LABELS.get(key, 'prompts')} {value}" for key, value in BASE.items())
    made = (folder / "commit.txt").read_text(encoding="utf-8")
    intro = (
        f"At commit {made}, one CPU thread, seconds of the process, medians of {REPEATS} updates in turn with "
        "`benchmarks/speed/reference_loop.py`, which makes the same model calls forward and backward and nothing else. "
        f"Rollout and update are told apart by the wall clock. Unless the row says otherwise: {size}, 64 pixels. "
        "Memory is the process's peak after one update, in brackets what the loop adds to the loaded model."
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
            if some:
                lines.append(Line(model, x, [row["whole"] for row in some], style="points", color=color))
                alone = [row["least"] for row in some]
                lines.append(Line(f"{model}, model calls alone", x, alone, style="dashed", color=color))
        panels.append(Panel(f"Seconds per update by {label}", label, "CPU seconds", lines))
    return draw_panels(panels, columns=2, size=(520, 340))
