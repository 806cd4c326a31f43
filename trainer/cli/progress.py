"""What a user sees of a run: a bar over each update's model calls, a line per update, how to continue after Ctrl-C."""

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..config.errors import ConfigError
from ..loop.interrupts import Interrupted
from ..program import program_name

if TYPE_CHECKING:
    from ..loop.align import Update
    from ..runs.folder import RunFolder

FIRST_REPORT = 10.0
"""Seconds until the first line about an unfinished update where there is no terminal; each later one takes twice as
long, so that a log file stays short."""
NO_SIGNAL = "no signal: the images of every group score alike"


class Stopped(Exception):
    """An interrupt after which the user has already been told how to continue."""

    def __init__(self, status: int):
        self.status = status


def is_main_process() -> bool:
    """Whether this is the process, of those that torchrun or accelerate has started, that prints messages."""
    return int(os.environ.get("RANK", "0")) == 0


class Bar:
    """Progress over the model calls of each update; `tick` is called by the loop. Without a terminal, single lines."""

    def __enter__(self) -> "Bar":
        self.mute = not is_main_process()
        self.lines = not (self.mute or sys.stderr.isatty())
        hide = self.mute or self.lines
        self.bar = tqdm(unit=" model calls", leave=False, disable=hide, dynamic_ncols=True)
        self._count("loading the model and the rewards")
        if self.lines:
            print(f"{self.phase} ...", file=sys.stderr, flush=True)
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()

    def tick(self) -> None:
        self.bar.update()
        self.calls += 1
        self._report(f"{self.calls} model calls")

    def _report(self, what: str) -> None:
        """A line about an unfinished phase, now and then, where there is no bar."""
        seconds = time.monotonic() - self.start
        if self.lines and seconds >= self.next_report:
            print(f"{self.phase}: {what} in {seconds:.0f} s", file=sys.stderr, flush=True)
            self.next_report = 2 * seconds

    def encoding(self, done: int, total: int) -> None:
        """Show how many prompts are encoded; then count the calls of the first update from 0."""
        if done == total:
            self._count(self.first)
            return
        self.bar.set_description(f"encoding prompts, {done} of {total}")
        self._report(f"{done} of {total} prompts encoded")

    def begin(self, done: int, total: int) -> None:
        """Count the calls of the first update; at its end, the bar knows how many an update takes."""
        self.total, self.first = total, f"update {min(done + 1, total)}/{total}"
        self._count(self.first)

    def show(self, update: "Update", folder: "RunFolder") -> None:
        """Print and log a finished update, and count the calls of the next one."""
        self.bar.total = self.bar.n if self.bar.total is None else self.bar.total
        self._count(f"update {min(update.number + 1, self.total)}/{self.total}")
        if not self.mute:
            line = update_line(update)
            folder.log(line)
            self.bar.write(line)

    def _count(self, phase: str) -> None:
        """Count from 0."""
        self.phase, self.calls, self.start, self.next_report = phase, 0, time.monotonic(), FIRST_REPORT
        self.bar.n = self.bar.last_print_n = 0
        self.bar.start_t = self.bar.last_print_t = time.time()
        self.bar.set_description(phase)


@contextmanager
def outcome(folder: "RunFolder", bar: Bar, quiet: bool = False) -> Iterator[None]:
    """Around a run: print its files at the end, or, after an interrupt, what was saved and how to continue."""
    try:
        yield
    except KeyboardInterrupt as error:
        with suppress(OSError):  # after SIGHUP there may be no terminal
            bar.bar.close()
        if not bar.mute:
            say_last(stopped_message(folder, str(error) or "Ctrl-C"), folder)
        raise Stopped(error.status if isinstance(error, Interrupted) else 130) from None
    bar.bar.close()
    if not (quiet or bar.mute):
        print(f"{folder.curves_file.resolve()}\n{folder.lora_file.resolve()}")


def say_last(message: str, folder: "RunFolder") -> None:
    """Print the last line of a run that was interrupted, and log it where there is a log."""
    with suppress(OSError):
        print(f"\n{message}", flush=True)
    if folder.log_file.is_file():
        with suppress(ConfigError):
            folder.log(message)


def stopped_message(folder: "RunFolder", reason: str) -> str:
    """What an interrupted run has saved, and the command that continues it."""
    if not folder.checkpoints.numbers() and folder.config_file.is_file():  # was killed earlier, and begins again
        return (
            f"stopped by {reason} before the first update was finished: none is saved; "
            f"begin again with: {program_name()} resume {folder.path}"
        )
    if not folder.checkpoints.numbers():
        return f"stopped by {reason} before the first update was finished: nothing was kept, start it again"
    saved = folder.checkpoint()
    return (
        f"stopped by {reason}: update {int(saved.name)} and all before it are saved in {saved.resolve()}; "
        f"continue with: {program_name()} resume {folder.path}"
    )


def guard_summary(row: dict[str, Any]) -> str:
    """A measurement of the guard in a few words, or its sentence about a violation."""
    if row["message"]:
        return row["message"]
    return f"guard: within limits, diversity {row['diversity']:.3f}, distance {row['distance']:.3f}, kept {row['kept']}"


def update_line(update: "Update") -> str:
    """An update in one line."""
    m = update.metrics
    seconds = m["seconds_rollout"] + m["seconds_reward"] + m["seconds_update"]
    parts = [f"update {update.number:>4}", f"reward {m['reward_mean']:.4f} +- {m['reward_std']:.4f}"]
    parts += [f"{name} {value:.3f} (held out)" for name, value in m["held_out"].items()]
    kl = [f"KL {m['kl']:.1e}"] if math.isfinite(m["kl"]) else []  # measured in some updates only
    parts += [f"clip {100 * m['clip_fraction']:.0f} %", *kl, f"grad {m['grad_norm']:.1e}"]
    if m["advantage_abs_max"] == 0:
        parts.append(NO_SIGNAL)
    if "guard" in m:
        parts.append(guard_summary(m["guard"]))
    return "  ".join([*parts, f"{seconds:.1f} s"])
