"""Folders inside ComfyUI: reward weights in models/rewards, runs in output/pcpo."""

import re
from pathlib import Path

import folder_paths

from ..trainer.config.schema import ConfigError
from ..trainer.runs.folder import RunFolder

NEWEST = "(newest)"
STARTED: dict[str, str] = {}
"""Name in Train LoRA (PCPO, GRPO) -> the run that was started last under it, in this session."""


def register_folders() -> None:
    """Add models/rewards to ComfyUI's model folders, after any that extra_model_paths.yaml names."""
    folder_paths.add_model_folder_path("rewards", str(Path(folder_paths.models_dir) / "rewards"), is_default=False)


def reward_folder(names: list[str]) -> Path | None:
    """The first reward folder that contains any of these files, otherwise the first reward folder."""
    folders = [Path(p) for p in folder_paths.get_folder_paths("rewards")]
    with_file = [f for f in folders if any((f / name).is_file() for name in names)]
    return next(iter(with_file or folders), None)


def runs_folder() -> Path:
    return Path(folder_paths.get_output_directory()) / "pcpo"


def tastes_folder() -> Path:
    """Folders of votes and the tastes learned from them."""
    return Path(folder_paths.get_output_directory()) / "pcpo_votes"


def vote_names() -> list[str]:
    """Folders of votes with a trained taste, sorted by name."""
    return sorted(path.parent.name for path in tastes_folder().glob("*/taste.safetensors"))


def run_names() -> list[str]:
    """Runs with at least one finished update, the one that trained last first."""
    folder = runs_folder()
    if not folder.is_dir():
        return []
    runs = [p for p in folder.iterdir() if (p / "config.toml").is_file() and has_updates(p)]
    return [p.name for p in sorted(runs, key=lambda p: (p / "metrics.jsonl").stat().st_mtime, reverse=True)]


def has_updates(run: Path) -> bool:
    metrics = run / "metrics.jsonl"
    return metrics.is_file() and metrics.stat().st_size > 0


def find_run(name: str) -> Path:
    """The folder of a run. Raises ConfigError that lists the existing runs."""
    names = run_names()
    if not names:
        raise ConfigError(f"{runs_folder()} contains no runs. Train one with Train LoRA (PCPO, GRPO) first.")
    if name != NEWEST and name not in names:
        raise ConfigError(f"run {name!r} does not exist in {runs_folder()}. Existing runs: {', '.join(names[:8])}.")
    return runs_folder() / (names[0] if name == NEWEST else name)


def free_run_name(name: str) -> str:
    """`name` if nothing has it, otherwise name-2, name-3, ...; a run that ended before its first update has no name."""
    if RunFolder(runs_folder() / name).is_free():
        return name
    numbers = [int(found[1]) for found in map(numbered(name).fullmatch, folder_names()) if found]
    highest = max(numbers, default=1)
    while not RunFolder(runs_folder() / f"{name}-{highest + 1}").is_free():
        highest += 1
    return f"{name}-{highest + 1}"


def folder_names() -> list[str]:
    folder = runs_folder()
    return [path.name for path in folder.iterdir() if not RunFolder(path).is_free()] if folder.is_dir() else []


def numbered(name: str) -> re.Pattern[str]:
    """Matches the names that `free_run_name` makes from a name."""
    return re.compile(re.escape(name) + r"-(\d+)")


def last_started(name: str) -> str | None:
    """The run that was started last under a name, as `name` or `name`-N; None if there is none.

    In one session that is remembered, so that a run that was cancelled before its first update is not taken for an
    older one; after a restart it is the one that trained last.
    """
    if name in STARTED:
        return STARTED[name]
    return next((run for run in run_names() if run == name or numbered(name).fullmatch(run)), None)
