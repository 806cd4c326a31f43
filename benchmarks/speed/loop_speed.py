"""Seconds and memory of the training loop compared with the reference loop, and how they grow."""

import statistics
from collections.abc import Iterator
from pathlib import Path

import torch

from comfyui_pcpo.tiny.align import PIXELS
from trainer.cli.libraries import quiet_libraries
from trainer.config.loading import build, merge
from trainer.config.schema import Config, ConfigError
from trainer.loop.align import Job, Update, align
from trainer.loop.plan import make_plan
from trainer.loop.state import make_training_state
from trainer.policy.loading import make_policy
from trainer.runs.rewards import make_rewards

from ..study.cells import Say
from ..study.files import commit, write_json
from ..study.recipes import STUDY_PROMPTS
from ..study.work import if_free, share
from .measuring import device_clock, in_new_process, peak_megabytes
from .reference_loop import reference_seconds

Point = tuple[str, str, int]  # model, axis, value on the axis
SPEED_MODELS = ("emoji-flow", "emoji-eps")
REPEATS = 9
BASE = {"prompts_per_update": 2, "group_size": 8, "steps": 8, "images_at_once": 8, "height": PIXELS, "width": PIXELS}
AXES: dict[str, tuple[int, ...]] = {
    "steps": (4, 8, 16),
    "group_size": (4, 8, 16),
    "images_at_once": (2, 4, 8),  # a minibatch of the base has 8 images
    "pixels": (64, 128, 192),
}
LABELS = {
    "steps": "denoising steps",
    "group_size": "images per prompt",
    "images_at_once": "images per model call",
    "pixels": "pixels per side",
}


def speed_points(models: tuple[str, ...] = SPEED_MODELS) -> list[Point]:
    """Every setting; the base, which is on all axes, once per model."""
    first = next(iter(AXES))
    points = [(model, axis, value) for model in models for axis, values in AXES.items() for value in values]
    return [(model, axis, value) for model, axis, value in points if axis == first or not is_base(axis, value)]


def base_value(axis: str) -> int:
    return BASE["height" if axis == "pixels" else axis]


def is_base(axis: str, value: int) -> bool:
    return value == base_value(axis)


def point_config(model: str, axis: str, value: int) -> Config:
    size = {"height": value, "width": value} if axis == "pixels" else {axis: value}
    tree = {
        "model": {"name": model},
        "prompts": {"lines": list(STUDY_PROMPTS)},
        "rollout": {**BASE, **size},
        "reward": {"weights": {"colorfulness": 1.0}},
        "objective": {"kl_images": 0},  # the KL is a diagnostic of a few images, which the reference loop lacks
        "optimizer": {"minibatches": 2},
    }
    return build(merge(tree, {"run": {"updates": REPEATS + 1}}), "speed")


def measure_loop(config: Config) -> dict[str, float]:
    """Medians over updates, alternating with the reference loop: seconds and peak memory."""
    policy = make_policy(config)
    loaded = peak_megabytes(policy.device)
    job = Job(config, config.prompts.read(), make_rewards(config))
    plan = make_plan(policy, config, job.objective, job.prompts, 1)
    updates = align(make_training_state(policy, config), job)
    next(updates)  # warm-up
    memory = peak_megabytes(policy.device)
    rounds = [
        {**timed_update(updates, policy.device), "least": reference_seconds(policy, config, plan)}
        for _ in range(REPEATS)
    ]
    medians = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
    # of adjacent measurements: what slows the computer affects both
    medians["outside"] = statistics.median(1 - r["least"] / r["whole"] for r in rounds)
    images = config.images_per_update
    return medians | {"images": images, "transitions": images * len(plan.trained), "peak": memory, "loaded": loaded}


def timed_update(updates: Iterator[Update], device: torch.device) -> dict[str, float]:
    """Seconds of one update, divided into its parts by their shares of the wall-clock time."""
    start = device_clock(device)
    metrics = next(updates).metrics
    whole = device_clock(device) - start
    parts = {name: metrics[f"seconds_{name}"] for name in ("rollout", "reward", "update")}
    total = sum(parts.values())
    return {"whole": whole, **{name: whole * seconds / total for name, seconds in parts.items()}}


def measure_point(model: str, axis: str, value: int, file: Path) -> None:
    """Entry point of a child process: one row, with the commit that it measures."""
    quiet_libraries()
    torch.set_num_threads(1)
    config = point_config(model, axis, value)
    point = {"model": model, "axis": axis, "value": value, "pixels": config.rollout.height, "commit": commit()}
    write_json(file, point | measure_loop(config))


def run_speed(out: Path, say: Say, models: tuple[str, ...] = SPEED_MODELS) -> None:
    """Measure every missing point, one process at a time, since two would slow each other down, -> speed/*.json."""
    folder = out / "speed"

    def missing() -> list[Point]:
        return [point for point in speed_points(models) if not point_file(folder, point).is_file()]

    def job() -> None:
        for point in missing():
            spawn_measurement(folder, point)
            say("speed: {}, {} {}".format(*point))

    share(lambda: [folder] if missing() else [], lambda locked: if_free(locked, job))


def point_file(folder: Path, point: Point) -> Path:
    return folder / "{}-{}-{}.json".format(*point)


def spawn_measurement(folder: Path, point: Point) -> None:
    """Measure one point in a new process. Raises ConfigError if it fails."""
    file = point_file(folder, point)
    status = in_new_process(measure_point, *point, file)
    if not file.is_file():
        raise ConfigError("{} with {} {} could not be measured: it exited with status {}".format(*point, status))
