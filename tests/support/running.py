"""Runs as a generator of updates, for tests that look between them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainer.loop.align import Update, align
from trainer.runs import launch
from trainer.runs.folder import RunFolder


def start_run(config: Any, tick: Callable[[], None] = lambda: None) -> tuple[RunFolder, Iterator[Update]]:
    """A new run, loaded and checked -> (folder, updates)."""
    run = launch.start_run(config, tick)
    return run.folder, kept(run)


def resume_run(
    path: Path, which: str = "latest", updates: int | None = None, tick: Callable[[], None] = lambda: None
) -> tuple[RunFolder, Any, Iterator[Update]]:
    """A run that continues -> (folder, config, updates)."""
    run = launch.resume_run(path, launch.ResumeOptions(which, updates), tick)
    return run.folder, run.config, kept(run)


def kept(run: launch.Run) -> Iterator[Update]:
    """The run's updates, each recorded before it is handed over."""
    with run:
        for update in align(run.state, run.job):
            run.keep(update)
            yield update
