"""Folders inside ComfyUI: reward weights in models/rewards, runs in output/pcpo."""

import re
from pathlib import Path

import folder_paths

from ..trainer.config.schema import ConfigError

NEWEST = "(newest)"


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


def run_names() -> list[str]:
    """Existing runs, newest first."""
    folder = runs_folder()
    if not folder.is_dir():
        return []
    runs = [p for p in folder.iterdir() if (p / "config.toml").is_file()]
    return [p.name for p in sorted(runs, key=lambda p: p.stat().st_mtime, reverse=True)]


def find_run(name: str) -> Path:
    """The folder of a run. Raises ConfigError that lists the existing runs."""
    names = run_names()
    if not names:
        raise ConfigError(f"{runs_folder()} contains no runs. Train one with Train LoRA (PCPO) first.")
    if name != NEWEST and name not in names:
        raise ConfigError(f"run {name!r} does not exist in {runs_folder()}. Existing runs: {', '.join(names[:8])}.")
    return runs_folder() / (names[0] if name == NEWEST else name)


def free_run_name(name: str) -> str:
    """`name` if no run has it, otherwise name-2, name-3, ..."""
    taken = set(run_names())
    if name not in taken:
        return name
    numbers = [int(m[1]) for n in taken if (m := re.fullmatch(re.escape(name) + r"-(\d+)", n))]
    return f"{name}-{max(numbers, default=1) + 1}"
