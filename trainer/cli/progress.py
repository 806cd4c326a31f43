"""What a person sees of a run: a bar over each update's model calls, a line per update, the way on after Ctrl-C."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from ..loop.align import Update
from ..runs.folder import RunFolder


class Stopped(KeyboardInterrupt):
    """Ctrl-C that has been answered in words."""


class Bar:
    """Progress over the model calls of each update; `tick` is given to the loop. A file gets the lines alone."""

    def __enter__(self) -> "Bar":
        self.mute = int(os.environ.get("RANK", "0")) > 0
        hide = self.mute or not sys.stderr.isatty()
        self.bar = tqdm(unit=" model calls", desc="loading", leave=False, disable=hide, dynamic_ncols=True)
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()

    def tick(self) -> None:
        self.bar.update()

    def begin(self, done: int, total: int) -> None:
        """Show the first update's count; its end shows how many calls an update takes."""
        self.total = total
        self._count(done + 1)

    def show(self, update: Update, folder: RunFolder) -> None:
        """Write a finished update's line and begin the next one's count."""
        self.bar.total = self.bar.n if self.bar.total is None else self.bar.total
        self._count(update.number + 1)
        if not self.mute:
            line = summary(update)
            folder.log(line)
            self.bar.write(line)

    def _count(self, number: int) -> None:
        self.bar.n = 0
        self.bar.last_print_n = 0
        self.bar.start_t = self.bar.last_print_t = time.time()
        self.bar.set_description(f"update {min(number, self.total)}/{self.total}")


@contextmanager
def outcome(folder: RunFolder, bar: Bar, quiet: bool = False) -> Iterator[None]:
    """Around a run: print its files at the end, or, after Ctrl-C, what was saved and how to continue."""
    try:
        yield
    except KeyboardInterrupt:
        if bar.mute:
            raise
        bar.bar.close()
        if folder.numbers():
            print(f"\nstopped; saved as {folder.checkpoint().resolve()}")
            print(f"continue with: python -m trainer resume {folder.path}")
        else:
            print(f"\nstopped before the first update was finished; {folder.path} holds nothing to resume")
        raise Stopped from None
    bar.bar.close()
    if not (quiet or bar.mute):
        print(f"{folder.curves_file.resolve()}\n{folder.lora_file.resolve()}")


def summary(update: Update) -> str:
    """An update in one line."""
    m = update.metrics
    seconds = m["seconds_rollout"] + m["seconds_reward"] + m["seconds_update"]
    parts = [f"update {update.number:>4}", f"reward {m['reward_mean']:.4f} +- {m['reward_std']:.4f}"]
    parts += [f"{name} {value:.3f} (held out)" for name, value in m["held_out"].items()]
    parts += [f"clip {100 * m['clip_fraction']:.0f} %", f"KL {m['kl']:.1e}", f"grad {m['grad_norm']:.1e}"]
    return "  ".join([*parts, f"{seconds:.1f} s"])
