"""Signals that end a run. SIGINT, SIGTERM and SIGHUP (SIGBREAK on Windows) all do the same, and lose nothing.

The first one raises Interrupted at once, except where a run holds it: between its updates, while it records and saves.
There it waits for the next update to begin. Whatever arrives after the first one changes nothing. A host that has an
interrupt of its own, such as ComfyUI, raises it from the run's tick, inside an update.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to end."""

    def __init__(self, number: int):
        self.number = number
        super().__init__(signal.Signals(number).name)

    @property
    def status(self) -> int:
        """The exit status that a shell expects."""
        return 128 + self.number


class Interrupts:
    """Handles SIGNALS while it is entered; signals that are ignored, as under nohup, stay ignored."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.held = self.in_run = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        self.received, self.held, self.in_run = None, False, False
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in SIGNALS}
            self._before = {n: handler for n, handler in handlers.items() if handler is not signal.SIG_IGN}
            for number in self._before:
                signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before, self.received = {}, None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        if not self.held:
            self.held = self.in_run  # further signals do not disturb what the first one set off
            raise Interrupted(self.received)

    def check(self) -> None:
        """Raise what was received, for where it was held or swallowed by code that cannot raise."""
        if self.received is not None:
            raise Interrupted(self.received)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Inside, signals wait."""
        before = self.held, self.in_run
        self.held = self.in_run = True
        try:
            yield
        finally:
            self.held, self.in_run = before

    @contextmanager
    def allow(self) -> Iterator[None]:
        """Inside, a signal raises at once, also one that has been waiting."""
        before, self.held = self.held, False
        try:
            self.check()
            yield
        finally:
            self.held = before


interrupts = Interrupts()
"""Those of this process; without `with interrupts:` nothing is ever received."""
