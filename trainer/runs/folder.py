"""The run folder: configuration, metrics, checkpoints, images; made, locked, resumed.

A checkpoint is written under a temporary name, flushed and renamed, and metrics beyond it are cut off on resume, so a
run that was killed at any moment goes on to the same numbers as one that was not.
"""

import contextlib
import math
import time
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import torch

from comfyui_pcpo.durable import safetensors_parts, write_durably
from comfyui_pcpo.lora.families import LORA_FAMILIES, Family, detect_family
from comfyui_pcpo.lora.formats import export_state
from comfyui_pcpo.plotting.grids import group_grid
from comfyui_pcpo.plotting.run_curves import curves

from ..config.loading import build, dump, dump_shareable, tomllib
from ..config.schema import Config, ConfigError
from ..config.text_files import read_text
from ..files import advice
from ..guard.limits import replay
from ..loop.align import Update
from ..loop.state import TrainingState
from ..policy.base import LoraPairs
from ..policy.lora_pairs import folded, load_pairs, read_lora
from ..program import program_name
from .checkpoint import EMA, LORA, STATE, Damaged, read_checkpoint, read_progress, verify, write_checkpoint
from .checkpoints import Checkpoints, is_number
from .rows import append_record, best_update, read_rows, row_line

CONFIG_HEAD = "# The settings of this run. The last line says that nothing is missing.\n"
CONFIG_END = "# end"


class NotSaved(ConfigError):
    """A checkpoint that could not be written."""


@contextmanager
def writing(file: Path, run: Path) -> Iterator[None]:
    """Turn an OSError into a ConfigError that names the file and the fix."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{file} could not be written: {error.strerror or error}. Finished checkpoints are intact. "
            f"{advice(error)} Then continue with `{program_name()} resume {run}`."
        ) from error


class RunFolder:
    """Paths and files of one run."""

    def __init__(self, path: Path):
        self.path = path
        self.config_file, self.metrics_file = path / "config.toml", path / "metrics.jsonl"
        self.lora_file, self.curves_file = path / "lora.safetensors", path / "curves.png"
        self.grids, self.log_file, self.lock_file = path / "grids", path / "log.txt", path / ".lock"
        self.checkpoints = Checkpoints(path / "checkpoints")
        self.board = path / "tensorboard"
        self.record_file = path / "run.json"  # what the run was made with, and accepted changes
        self.guard_file = path / "guard.safetensors"  # what the guard measured of the base model
        self._used: Config | None = None
        self._own_log = True  # whether log.txt may be removed with an unstarted run

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Only one process at a time writes here; the lock goes when the process does, however it ends."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.lock_file)
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

    @contextmanager
    def using(self, config: Config) -> Iterator[None]:
        """Inside, the run's settings are these, whatever an editor does to config.toml meanwhile."""
        self._used = config
        try:
            yield
        finally:
            self._used = None

    def start(self, config: Config) -> None:
        """Write the resolved configuration into a new folder."""
        self._own_log = self.config_file.exists() or not self.log_file.exists()
        self.rewrite_config(config)

    @property
    def first_files(self) -> list[Path]:
        """What a run writes before its first update."""
        return [self.config_file, self.record_file, self.guard_file, self.log_file, self.lock_file]

    def is_free(self) -> bool:
        """Whether a run may begin here: no folder, an empty one, or the rest of one without a finished update."""
        if not self.path.exists():
            return True
        return (
            self.path.is_dir() and set(self.path.iterdir()) <= set(self.first_files) and not self.has_foreign_config()
        )

    def remove_unstarted(self) -> None:
        """Remove what a run without a finished update has written, and the folder unless it holds anything else."""
        own = [file for file in self.first_files if self._own_log or file != self.log_file]
        with contextlib.suppress(OSError):
            for file in (*self.board.glob("events.out.tfevents.*"), *own):
                file.unlink(missing_ok=True)
            if self.board.is_dir():
                self.board.rmdir()
            self.path.rmdir()

    def require_new(self) -> None:
        """Raise ConfigError if the folder holds a run, or a config.toml of something else."""
        if self.metrics_file.exists() or self.checkpoints.path.exists():
            raise ConfigError(
                f"{self.path} already holds a run. Continue it with `{program_name()} resume {self.path}`, "
                "or give this one another name with --run.name."
            )
        if self.has_foreign_config():
            raise ConfigError(
                f"{self.config_file} was not written by a run and would be overwritten. Give this run another name "
                "with --run.name."
            )

    def has_foreign_config(self) -> bool:
        """Whether there is a config.toml that no run of this version has written."""
        return self.config_file.exists() and not self.config_file.read_bytes().startswith(CONFIG_HEAD.encode())

    def config(self) -> Config:
        """The settings in use, or those of config.toml."""
        if self._used is not None:
            return self._used
        if not self.config_file.is_file():
            raise ConfigError(f"{self.path} is not a run: it has no config.toml. Give a folder that `train` made.")
        try:
            text = read_text(self.config_file)
            tree = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{self.config_file} is damaged: {error}. Restore it, or start a new run.") from None
        if not tree:
            raise ConfigError(f"{self.config_file} is empty. Restore it, or start a new run.")
        if text.startswith(CONFIG_HEAD[:20]) and not text.rstrip().endswith(CONFIG_END):
            raise ConfigError(
                f"{self.config_file} is cut off: its last line, `{CONFIG_END}`, is missing, so settings may be lost. "
                "Restore the file; if only that line was removed, add it."
            )
        return build(tree, str(self.config_file))

    def rewrite_config(self, config: Config) -> None:
        """Store the options, so that the next resume uses them."""
        with writing(self.config_file, self.path):
            write_durably(self.config_file, f"{CONFIG_HEAD}{dump(config)}\n{CONFIG_END}\n".encode())

    def records(self) -> list[dict[str, Any]]:
        """All metrics, one dict per update; a last line that a crash cut short is left out."""
        rows, damaged = read_rows(self.metrics_file)
        if damaged and damaged[0] <= len(rows):  # not the last line
            warnings.warn(f"{self.metrics_file}: line {damaged[0]} cannot be read and is left out", stacklevel=2)
        return rows

    def keep_records(self, done: int) -> None:
        """Cut off what was recorded after update `done`; of an update that is there twice, keep the last row."""
        kept = {row["update"]: row_line(row) for row in read_rows(self.metrics_file)[0] if row["update"] <= done}
        write_durably(self.metrics_file, "".join(kept[number] for number in sorted(kept)).encode())

    def record(self, update: Update) -> None:
        with writing(self.metrics_file, self.path):
            append_record(self.metrics_file, update.metrics)

    def log(self, text: str) -> None:
        with writing(self.log_file, self.path), self.log_file.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def draw(self, update: Update, group_size: int) -> Path:
        """The newest images, each group under its prompt and sorted by score."""
        order = update.scores.nan_to_num(-math.inf).view(-1, group_size).argsort(1, descending=True)
        rows = (order + torch.arange(len(order))[:, None] * group_size).flatten()[: 8 * group_size]
        prompts = [update.prompts[i] for i in rows[::group_size].tolist()]
        captions = [f"{update.scores[i]:.2f}" for i in rows.tolist()]
        path = self.grids / f"{update.number:06d}.jpg"
        with writing(path, self.path):
            self.grids.mkdir(exist_ok=True)
            group_grid(update.images[rows], prompts, captions).save(path, quality=92)
        return path

    def draw_curves(self) -> None:
        records = self.records()
        if records:
            with writing(self.curves_file, self.path):
                curves(records).save(self.curves_file)

    def save(self, state: TrainingState, config: Config, use: bool = True) -> Path:
        """A checkpoint after the last finished update; `use` makes lora.safetensors its LoRA."""
        try:
            with self.checkpoints.new(state.done) as folder:
                pairs = write_checkpoint(state, folder, config.lora.scale)
                if use:
                    self.write_lora(folded(pairs, config.lora.scale), state.policy.family, config, state.done)
        except OSError as error:
            raise NotSaved(
                f"checkpoint {state.done:06d} could not be written to {self.checkpoints.path}: {error}. "
                f"Earlier checkpoints are intact. {advice(error)} Then continue with `{program_name()} resume "
                f"{self.path}`."
            ) from error
        return self.checkpoints.folder(state.done)

    def prune(self, last: int, kept: int | None) -> None:
        """Remove all checkpoints but the `last` ones, the best, the guard's and every LANDMARK-th; 0 keeps all."""
        numbers = self.checkpoints.numbers()
        if last and len(numbers) > last:
            self.checkpoints.prune({*numbers[-last:], self.best_number(numbers), kept})

    def remove_leftovers(self) -> None:
        """Remove what a killed process left half written or half removed."""
        self.checkpoints.remove_leftovers()
        for file in self.path.glob("*.tmp"):
            file.unlink()

    def write_lora(self, pairs: LoraPairs, family: Family, config: Config, number: int) -> None:
        """The LoRA of update `number` under ComfyUI's names; its metadata has the settings, but no prompt or path."""
        rank = config.lora.rank
        tensors = export_state(pairs, rank, rank, "comfyui", family)
        metadata = {
            "pcpo.config": dump_shareable(config),
            "pcpo.updates": str(number),
            "pcpo.family": family,
            "format": "pt",
        }
        write_durably(self.lora_file, *safetensors_parts(tensors, metadata))

    def write_final(self, family: Family, config: Config) -> None:
        """Make lora.safetensors that of the final checkpoint."""
        number = int(self.checkpoint("final").name)
        try:
            pairs = self.lora(str(number))
        except Damaged as error:
            raise ConfigError(f"{error} Remove it, and the guard keeps another update.") from None
        with writing(self.lora_file, self.path):
            self.write_lora(pairs, family, config, number)

    def family(self) -> Family:
        """The LoRA's family, which its file names; module names alone can be those of several."""
        named = read_lora(self.lora_file)[1].get("pcpo.family", "") if self.lora_file.is_file() else ""
        return named if named in LORA_FAMILIES else detect_family(self.lora())

    def checkpoint(self, which: str = "latest") -> Path:
        """Folder of the latest, best (highest mean reward), kept (by the guard) or numbered checkpoint.

        `final` is that of lora.safetensors: the kept one, or the latest where nothing was kept.
        """
        numbers = self.checkpoints.numbers()
        if not numbers:
            self.config()  # names a folder that is no run
            raise ConfigError(
                f"{self.path} has no checkpoint yet. Wait for its first one (run.save_every), or "
                "resume it if it is no longer training."
            )
        if which == "final":
            which = "latest" if self.kept() is None else "kept"
        if which == "latest":
            number = numbers[-1]
        elif which == "best":
            number = self.best_number(numbers)
        elif which == "kept":
            number = self.kept_number()
        elif is_number(which) and int(which) in numbers:
            number = int(which)
        else:
            raise ConfigError(f"checkpoint {which} is not in {self.path}. There are {', '.join(map(str, numbers))}.")
        return self.checkpoints.folder(number)

    def best_number(self, numbers: Collection[int]) -> int:
        """The update with the highest mean reward among `numbers`."""
        return best_update(read_rows(self.metrics_file)[0], numbers, self.config())

    def kept(self) -> int | None:
        """The update that the guard keeps, by the limits of config.toml; None where there is none."""
        guard = self.config().guard
        return replay(self.records(), guard, self.checkpoints.numbers()).kept if guard.every else None

    def kept_number(self) -> int:
        """The update that the guard keeps. Raises ConfigError where there is none."""
        kept = self.kept()
        if kept is not None:
            return kept
        raise ConfigError(
            f"{self.path} has no kept checkpoint: the guard was off (guard.every = 0), or no measured update was "
            "within its limits. Use final, latest, best or a number."
        )

    def lora(self, which: str = "latest") -> LoraPairs:
        """A checkpoint's factors, those of the EMA if the run keeps one, with its alpha / rank folded in."""
        folder = self.checkpoint(which)
        name = EMA if (folder / EMA).is_file() else LORA
        verify(folder, name, STATE)
        scale = read_progress(folder).get("lora_scale")  # versions before 0.2 record none
        return folded(load_pairs(folder / name), self.config().lora.scale if scale is None else scale)

    def lora_modules(self, which: str = "latest") -> list[str]:
        """Names of the modules that a checkpoint's LoRA changes."""
        return list(load_pairs(self.checkpoint(which) / LORA))

    def intact(self, which: str = "latest") -> int:
        """The number of a checkpoint, verified; of an older one, with a warning, if the latest is damaged."""
        return self.checkpoints.intact(int(self.checkpoint(which).name), or_older=which == "latest")

    def load(self, state: TrainingState, which: str = "latest") -> None:
        """Bring `state` to a checkpoint, or to an older one as `intact` says. Raises ConfigError if it does not fit."""
        read_checkpoint(self.checkpoint(str(self.intact(which)))).restore(state)
