"""The run folder: configuration, metrics, checkpoints, images; made, locked, resumed.

A checkpoint is written under a temporary name and renamed, and metrics beyond it are cut off on resume, so a run that
was killed at any moment goes on to the same numbers as one that was not.
"""

import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from comfyui_pcpo.lora.families import LORA_FAMILIES, Family, detect_family
from comfyui_pcpo.lora.formats import export_state
from comfyui_pcpo.plotting.grids import grid
from comfyui_pcpo.plotting.run_curves import curves

from ..config.loading import build, dump, tomllib
from ..config.schema import Config, ConfigError
from ..loop.align import Update
from ..loop.state import TrainingState
from ..policy.base import LoraPairs
from ..policy.lora_pairs import folded, load_pairs, read_lora, save_pairs
from ..program import program_name


class NotSaved(ConfigError):
    """A checkpoint that could not be written."""


class NoEma(ConfigError):
    """A checkpoint of a run without an EMA, for one that keeps an EMA."""


@contextmanager
def writing(file: Path, run: Path) -> Iterator[None]:
    """Turn an OSError into a ConfigError that names the file and the fix."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{file} could not be written: {error.strerror or error}. Finished checkpoints are intact. "
            f"Free some disk space, then `{program_name()} resume {run}`."
        ) from error


class RunFolder:
    """Paths and files of one run."""

    def __init__(self, path: Path):
        self.path = path
        self.config_file, self.metrics_file = path / "config.toml", path / "metrics.jsonl"
        self.lora_file, self.curves_file = path / "lora.safetensors", path / "curves.png"
        self.checkpoints, self.grids, self.log_file = path / "checkpoints", path / "grids", path / "log.txt"
        self.guard_file = path / "guard.safetensors"  # what the guard measured of the base model

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Only one process at a time writes here; the lock goes when the process does, however it ends."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ConfigError(
                f"{self.path} is in use by another process. Wait for it to finish, or give this run another name with "
                "--run.name."
            ) from None
        try:
            yield
        finally:
            lock.release()

    def start(self, config: Config) -> None:
        """Write the resolved configuration into an empty folder."""
        self.require_new()
        with writing(self.config_file, self.path):
            self.config_file.write_text(dump(config), encoding="utf-8")

    def require_new(self) -> None:
        """Raise ConfigError if the folder holds a run."""
        if self.metrics_file.exists() or self.checkpoints.exists():
            raise ConfigError(
                f"{self.path} already holds a run. Continue it with `{program_name()} resume {self.path}`, "
                "or give this one another name with --run.name."
            )

    def config(self) -> Config:
        if not self.config_file.is_file():
            raise ConfigError(f"{self.path} is not a run: it has no config.toml. Give a folder that `train` made.")
        try:
            tree = tomllib.loads(self.config_file.read_text(encoding="utf-8"))
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{self.config_file} is damaged: {error}. Restore it, or start a new run.") from None
        return build(tree, str(self.config_file))

    def records(self) -> list[dict[str, Any]]:
        """All metrics, one dict per update; a last line that a crash cut short is left out."""
        if not self.metrics_file.is_file():
            return []
        rows = []
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def keep_records(self, done: int) -> None:
        """Cut off what was recorded after update `done`."""
        kept = [row for row in self.records() if row["update"] <= done]
        _replace_text(self.metrics_file, "".join(_line(row) for row in kept))

    def keep_checkpoints(self, done: int) -> None:
        """Put checkpoints after update `done` aside as NUMBER.old: the run goes on from there along another path."""
        for number in self.numbers():
            if number > done:
                aside = self.checkpoints / f"{number:06d}.old"
                shutil.rmtree(aside, ignore_errors=True)
                (self.checkpoints / f"{number:06d}").rename(aside)

    def rewrite_config(self, config: Config) -> None:
        """Store changed options, so that the next resume uses them."""
        _replace_text(self.config_file, dump(config))

    def record(self, update: Update) -> None:
        with writing(self.metrics_file, self.path), self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(_line(update.metrics))

    def log(self, text: str) -> None:
        with writing(self.log_file, self.path), self.log_file.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def draw(self, update: Update, group_size: int) -> Path:
        """The newest images, each group sorted by score."""
        order = update.scores.nan_to_num(-math.inf).view(-1, group_size).argsort(1, descending=True)
        rows = (order + torch.arange(len(order))[:, None] * group_size).flatten()[: 8 * group_size]
        captions = [f"{update.prompts[i]}  {update.scores[i]:.2f}" for i in rows.tolist()]
        path = self.grids / f"{update.number:06d}.jpg"
        with writing(path, self.path):
            self.grids.mkdir(exist_ok=True)
            grid(update.images[rows], captions, columns=group_size).save(path, quality=92)
        return path

    def draw_curves(self) -> None:
        records = self.records()
        if records:
            with writing(self.curves_file, self.path):
                curves(records).save(self.curves_file)

    def save(self, state: TrainingState, config: Config) -> Path:
        """A checkpoint after the last finished update, and the LoRA to use."""
        name = f"{state.done:06d}"
        final, temporary = self.checkpoints / name, self.checkpoints / f"{name}.tmp"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            pairs = state.policy.lora()
            save_pairs(pairs, temporary / "lora.safetensors")
            torch.save(state.optimizer.state_dict(), temporary / "optimizer.pt")
            rest: dict[str, Any] = {"update": state.done, "window": state.window.state_dict()}
            if state.ema is not None:
                with state.ema.in_place():
                    pairs = state.policy.lora()
                save_pairs(pairs, temporary / "average.safetensors")
                rest["average_steps"] = state.ema.steps
            if state.kl_weight is not None:
                rest["kl_weight"] = state.kl_weight
            (temporary / "state.json").write_text(json.dumps(rest), encoding="utf-8")
            self.write_lora(folded(pairs, config.lora.scale), state.policy.family, config, state.done)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have errors of their own
            shutil.rmtree(temporary, ignore_errors=True)
            raise NotSaved(
                f"checkpoint {name} could not be written to {self.checkpoints}: {error}. "
                f"Earlier checkpoints are intact. Free some disk space, then `{program_name()} resume {self.path}`."
            ) from error
        return final

    def write_lora(self, pairs: LoraPairs, family: Family, config: Config, number: int) -> None:
        """The LoRA of update `number` under ComfyUI's names, with the configuration in its metadata."""
        rank = config.lora.rank
        tensors = export_state(pairs, rank, rank, "comfyui", family)
        metadata = {
            "pcpo.config": dump(config),
            "pcpo.updates": str(number),
            "pcpo.family": family,
            "format": "pt",
        }
        temporary = self.lora_file.with_suffix(".tmp")
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata)
        temporary.replace(self.lora_file)

    def family(self) -> Family:
        """The LoRA's family, which its file names; module names alone can be those of several."""
        named = read_lora(self.lora_file)[1].get("pcpo.family", "") if self.lora_file.is_file() else ""
        return named if named in LORA_FAMILIES else detect_family(self.lora())

    def numbers(self) -> list[int]:
        """Updates that have a whole checkpoint, oldest first."""
        if not self.checkpoints.is_dir():
            return []
        return sorted(int(p.name) for p in self.checkpoints.iterdir() if p.is_dir() and p.name.isdigit())

    def checkpoint(self, which: str = "latest") -> Path:
        """Folder of the latest, best (highest mean reward), kept (by the guard) or numbered checkpoint."""
        numbers = self.numbers()
        if not numbers:
            raise ConfigError(f"{self.path} has no checkpoints yet. Resume it to continue training.")
        if which == "latest":
            number = numbers[-1]
        elif which == "best":
            means = {row["update"]: row["reward_mean"] for row in self.records()}
            number = max(numbers, key=lambda n: means.get(n, -math.inf))
        elif which == "kept":
            number = self.kept_number()
        elif which.isdigit() and int(which) in numbers:
            number = int(which)
        else:
            raise ConfigError(f"checkpoint {which} is not in {self.path}. There are {', '.join(map(str, numbers))}.")
        return self.checkpoints / f"{number:06d}"

    def kept_number(self) -> int:
        """The update that the guard keeps. Raises ConfigError where there is none."""
        kept = [row["guard"]["kept"] for row in self.records() if "guard" in row][-1:]
        if kept and kept[0] in self.numbers():
            return kept[0]
        raise ConfigError(
            f"{self.path} has no kept checkpoint: the guard was off (guard.every = 0), or no measured update was "
            "within its limits. Use latest, best or a number."
        )

    def lora(self, which: str = "latest") -> LoraPairs:
        """A checkpoint's factors, those of the EMA if the run keeps one, with alpha / rank folded into the second."""
        average = self.checkpoint(which) / "average.safetensors"
        file = average if average.is_file() else average.with_name("lora.safetensors")
        return folded(load_pairs(file), self.config().lora.scale)

    def load(self, state: TrainingState, which: str = "latest") -> None:
        """Bring `state` to a checkpoint. Raises ConfigError that names a damaged file and an older checkpoint."""
        folder = self.checkpoint(which)
        try:
            rest = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            if state.ema is not None and "average_steps" not in rest:
                raise NoEma(
                    f"checkpoint {folder} has no EMA, because optimizer.ema_decay was 0. Set it to 0 to resume, or "
                    "start a new run from this one's LoRA with lora.start."
                )
            if state.ema is not None:
                state.policy.load_lora(load_pairs(folder / "average.safetensors"))
                state.ema.restart(rest["average_steps"])
            state.policy.load_lora(load_pairs(folder / "lora.safetensors"))
            state.load_moments(torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))
            state.window.load_state_dict(rest["window"])
            state.done = rest["update"]
            if state.kl_weight is not None:
                state.kl_weight = rest.get("kl_weight", state.kl_weight)  # missing where the budget is new
        except NoEma:
            raise
        except Exception as error:
            older = [n for n in self.numbers() if n < int(folder.name)]
            way = f"Use --checkpoint {older[-1]}" if older else "Start the run again under another name"
            raise ConfigError(f"checkpoint {folder} is damaged ({type(error).__name__}: {error}). {way}.") from error


def _line(row: dict[str, Any]) -> str:
    """One JSON line; NaN and infinity become null, which every JSON reader takes."""
    return json.dumps(finite(row)) + "\n"


def finite(value: Any) -> Any:
    """`value` as JSON has it: NaN and infinity become None."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _replace_text(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
