"""A run's checkpoints by number: each has its name only once it is complete; which ones stay, and which are intact."""

import contextlib
import shutil
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from comfyui_pcpo.durable import flush_folder

from ..config.schema import ConfigError
from .checkpoint import MANIFEST, Damaged, verify

LANDMARK = 100
"""Every so many updates a checkpoint is kept for good."""


class Checkpoints:
    """The folder `checkpoints` of a run, which need not exist."""

    def __init__(self, path: Path):
        self.path = path

    def folder(self, number: int) -> Path:
        """Where the checkpoint of an update is, or would be."""
        return self.path / f"{number:06d}"

    def numbers(self) -> list[int]:
        """Updates that have a whole checkpoint, oldest first."""
        if not self.path.is_dir():
            return []
        return sorted(int(p.name) for p in self.path.iterdir() if p.is_dir() and is_number(p.name))

    def has_manifest(self) -> bool:
        """Whether a checkpoint has a manifest, as all have since version 0.2."""
        return any((self.folder(number) / MANIFEST).is_file() for number in self.numbers())

    @contextmanager
    def new(self, number: int) -> Iterator[Path]:
        """A path to write a checkpoint to; it becomes that of update `number` if nothing inside raises."""
        final = self.folder(number)
        temporary = final.with_suffix(".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            yield temporary
            discard(final)
            temporary.rename(final)
            flush_folder(self.path)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def intact(self, number: int, or_older: bool) -> int:
        """`number`, if that checkpoint is as it was saved; otherwise, with a warning, the newest older one that is.

        Raises ConfigError where there is none, or not `or_older`.
        """
        try:
            verify(self.folder(number))
            return number
        except Damaged as error:
            for older in [n for n in reversed(self.numbers()) if n < number]:
                with contextlib.suppress(Damaged):
                    verify(self.folder(older))
                    if not or_older:
                        raise ConfigError(f"{error} Use --checkpoint {older}.") from None
                    warnings.warn(f"{error} The run goes on from update {older} instead", stacklevel=2)
                    return older
            raise ConfigError(f"{error} No older one is intact. Start the run again under another name.") from None

    def put_aside(self, done: int) -> None:
        """Rename checkpoints after update `done` to NUMBER.old: the run goes on from there along another path."""
        for number in self.numbers():
            if number > done:
                aside = self.folder(number).with_suffix(".old")
                shutil.rmtree(aside, ignore_errors=True)
                self.folder(number).rename(aside)

    def prune(self, spared: Collection[int | None]) -> None:
        """Remove all checkpoints but the `spared` ones and every LANDMARK-th."""
        for number in self.numbers():
            if number not in spared and number % LANDMARK:
                discard(self.folder(number))

    def remove_leftovers(self) -> None:
        """Remove what a killed process left half written or half removed."""
        for folder in (*self.path.glob("*.tmp"), *self.path.glob("*.gone")):
            shutil.rmtree(folder, ignore_errors=True)


def discard(folder: Path) -> None:
    """Remove a folder, if it exists; a crash halfway leaves none under its name."""
    if folder.is_dir():
        gone = folder.with_suffix(".gone")
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def is_number(name: str) -> bool:
    """Whether a checkpoint can be called this: some digits are no numbers, and some numbers are too long."""
    return name.isascii() and name.isdigit() and len(name) < 20
