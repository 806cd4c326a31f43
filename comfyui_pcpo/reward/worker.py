"""Calls a user's own reward in a thread, so that code that hangs can be interrupted and named."""

import atexit
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

T = TypeVar("T")
POLL, NOTICE = 0.1, 60.0  # seconds between two ticks, and until the first message; each later one takes twice as long
logger = logging.getLogger(__name__)


class Worker:
    """One thread for all calls of a reward: libraries may bind what they open to the thread that opened it.

    A daemon, so that a call that never returns does not keep the program from ending.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[Any] = SimpleQueue()
        self._thread = threading.Thread(target=serve, args=(self._calls,), daemon=True)
        self._thread.start()
        self._latest: Future[Any] | None = None
        weakref.finalize(self, self._calls.put, None)

    @property
    def busy(self) -> bool:
        """Whether a call that was abandoned has not returned; calls from the thread itself are never in its way."""
        return not (self._latest is None or self._latest.done() or threading.current_thread() is self._thread)

    def call(self, name: str, work: Callable[[], T], tick: Callable[[], None]) -> T:
        """What `work` returns or raises. Meanwhile `tick` is called and may raise; then `work` is abandoned."""
        if threading.current_thread() is self._thread:  # a reward that scores with itself
            return work()
        future: Future[T] = Future()
        self._latest = future
        self._calls.put((future, in_mode_of_caller(work)))
        start, notice = time.monotonic(), NOTICE
        try:
            while not wait([future], POLL).done:
                tick()
                if (seconds := time.monotonic() - start) >= notice:
                    logger.warning("reward %s has been computing for %.0f s. Ctrl-C or Cancel ends it.", name, seconds)
                    notice *= 2
        except KeyboardInterrupt as error:
            atexit.register(end_program, self, getattr(error, "status", 130))
            raise
        self._latest = None
        return future.result()


def end_program(worker: Worker, status: int) -> None:
    """End the program under a thread that still computes: Python would end it inside a library, which aborts."""
    if worker.busy:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve(calls: "SimpleQueue[Any]") -> None:
    """Answer calls until None comes."""
    while answer(calls.get()):
        pass


def answer(call: tuple["Future[Any]", Callable[[], Any]] | None) -> bool:
    """Do one call, -> whether there was one. A function, so that its locals, such as images, are freed on return."""
    if call is None:
        return False
    future, work = call
    try:
        future.set_result(work())
    except BaseException as error:  # raised again in the thread that called
        future.set_exception(error)
    return True


def in_mode_of_caller(work: Callable[[], T]) -> Callable[[], T]:
    """`work` under the gradient mode and the current GPU of this thread, which another thread does not share."""
    inference, gradient = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def there() -> T:
        if gpu is not None:
            torch.cuda.set_device(gpu)
        with torch.inference_mode(inference), torch.set_grad_enabled(gradient):
            return work()

    return there
