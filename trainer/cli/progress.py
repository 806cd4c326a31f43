"""What a person sees of a run: a bar over each update's model calls, a line per update, the way on after Ctrl-C."""

import os
import sys
import time
from collections.abc import Iterator
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

    def next(self, update: Update | None, done: int, total: int) -> None:
        """Begin the next update's count; the first one shows how many calls an update takes."""
        if update is not None:
            self.bar.total = self.bar.n if self.bar.total is None else self.bar.total
        self.bar.n = 0
        self.bar.last_print_n = 0
        self.bar.start_t = self.bar.last_print_t = time.time()
        self.bar.set_description(f"update {min(done + 1, total)}/{total}")


def follow(folder: RunFolder, updates: Iterator[Update], total: int, bar: Bar, quiet: bool = False) -> None:
    """One line per update; on Ctrl-C the loop saves, and the way on is said."""
    bar.next(None, len(folder.records()), total)
    try:
        for update in updates:
            bar.next(update, update.number, total)
            line = summary(update)
            if not bar.mute:
                folder.log(line)
                bar.bar.write(line)
    except KeyboardInterrupt:
        if bar.mute:
            raise
        latest = folder.checkpoint() if folder.numbers() else None
        bar.bar.close()
        if latest is None:
            print(f"\nstopped before the first update was finished; {folder.path} holds nothing to resume")
        else:
            print(f"\nstopped; saved as {latest.resolve()}\ngo on with: python -m trainer resume {folder.path}")
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
