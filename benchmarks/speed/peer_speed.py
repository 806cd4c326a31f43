"""Images and model evaluations per second of our loop and of the peers' own, on the same model and sizes."""

import contextlib
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from trainer.cli.libraries import quiet_libraries
from trainer.config.loading import build
from trainer.config.schema import Config, ConfigError
from trainer.loop.align import Job, align
from trainer.loop.state import make_training_state
from trainer.policy.loading import make_policy
from trainer.runs.rewards import make_rewards

from ..markdown import format_number, markdown_table
from ..study.cells import Say
from ..study.files import commit, read_json, write_json
from ..study.recipes import STUDY_PROMPTS
from .measuring import in_new_process
from .peer_scripts import PEERS, Finished, PeerSettings, SpeedMeter

PEER_RECIPES: dict[str, dict[str, Any]] = {  # our side of each peer's settings
    "ddpo-pytorch": {
        "model": {"name": "emoji-eps"},
        "objective": {"last_step": True},
        "lora": {"rank": 4, "targets": "attention"},
    },
    "flow_grpo": {
        "model": {"name": "emoji-flow"},
        "objective": {"last_step": False},
        "lora": {"rank": 32, "alpha": 64, "targets": "attention"},
    },
}


def peer_config(name: str, settings: PeerSettings) -> Config:
    """Our configuration at a peer's settings; what the peer does not set is our default, the measured KL included."""
    s, recipe = settings, PEER_RECIPES[name]
    tree = {
        **recipe,
        "model": {**recipe["model"], "device": s.device},
        "prompts": {"lines": list(STUDY_PROMPTS)},
        "rollout": {"prompts_per_update": s.batches, "group_size": s.images, "steps": s.steps},
        "reward": {"weights": {"jpeg_compressibility": 1.0}},
        "optimizer": {"minibatches": s.batches},
        "run": {"updates": s.updates + 2},
    }
    return build(tree, "peers")


def run_ours(name: str, settings: PeerSettings) -> SpeedMeter:
    """Our loop at a peer's settings, measured as the peer is: from the start of one rollout to that of another."""
    config = peer_config(name, settings)
    policy, meter = make_policy(config), SpeedMeter(settings)
    meter.watch(policy.denoiser)
    updates = align(make_training_state(policy, config), Job(config, config.prompts.read(), make_rewards(config)))
    with contextlib.suppress(Finished):
        while True:
            for _ in range(settings.batches):
                meter.mark()
            next(updates)
    return meter


def measure(name: str, clone: Path | None, settings: PeerSettings, file: Path) -> None:
    """Entry point of a child process: the peer's script from its clone, or our loop."""
    quiet_libraries()
    torch.set_num_threads(1)
    try:
        if clone is None:
            meter = run_ours(name, settings)
        else:
            with tempfile.TemporaryDirectory() as work:
                meter = PEERS[name](clone, settings, Path(work))
    except ConfigError as error:
        write_json(file, {"error": str(error)})
        return
    write_json(file, meter.result())


def spawn(name: str, clone: Path | None, settings: PeerSettings) -> dict[str, float]:
    """Measure in a new process. Raises ConfigError if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        status = in_new_process(measure, name, clone, settings, file)
        result = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if "images_per_second" not in result:
        why = result.get("error", f"it exited with status {status}")
        raise ConfigError(f"{name} could not be measured: {why}")
    return result


def compare_with_peers(clones: dict[str, Path], settings: PeerSettings, rounds: int, say: Say) -> list[dict[str, Any]]:
    """Alternate between our loop and each peer's, -> one row per peer, medians over the rounds."""
    rows = []
    for name, clone in clones.items():
        sides: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
        for number in range(rounds):
            sides["ours"].append(spawn(name, None, settings))
            sides["theirs"].append(spawn(name, clone, settings))
            say(f"{name}: round {number + 1} of {rounds}")
        row: dict[str, Any] = {"peer": name, "device": settings.device}
        for side, results in sides.items():
            row[side] = {key: statistics.median(result[key] for result in results) for key in results[0]}
        row["ratio"] = statistics.median(
            ours["images_per_second"] / theirs["images_per_second"]
            for ours, theirs in zip(sides["ours"], sides["theirs"], strict=True)
        )
        rows.append(row)
    return rows


def write_peers(rows: list[dict[str, Any]], file: Path) -> list[dict[str, Any]]:
    """Add the rows to those of other peers in `file`, each with its commit, -> all rows."""
    known = {row["peer"]: row for row in read_json(file, [])}
    known |= {row["peer"]: {**row, "commit": commit()} for row in rows}
    write_json(file, list(known.values()))
    return list(known.values())


def on_gpu(row: dict[str, Any]) -> str:
    return ", on a GPU" if row.get("device", "cpu").startswith("cuda") else ""


def peer_table(rows: list[dict[str, Any]]) -> str:
    """The measurements as a markdown table."""
    keys = ("images_per_second", "evaluations_per_second", "images_per_cpu_second", "evaluations_per_image")
    lines = [
        [name + on_gpu(row), *(format_number(row[side][key], 2) for key in keys), ratio]
        for row in rows
        for side, name, ratio in (("theirs", row["peer"], "1.00"), ("ours", "ours", format_number(row["ratio"], 2)))
    ]
    head = ["", *(key.replace("_", " ") for key in keys), "images per second, relative"]
    return markdown_table(head, lines)
