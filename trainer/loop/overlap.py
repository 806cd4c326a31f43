"""Rewards computed elsewhere, by a server or a person, score finished images while the next ones are sampled."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from comfyui_pcpo.reward.base import Reward
from comfyui_pcpo.reward.group import GroupReward

from .plan import Plan

WAITING_SECONDS = 0.1  # between two calls of `waiting`


@dataclass
class Overlap:
    """Scores of one update's images by rewards computed elsewhere; calls, their order and so all scores are the same
    with a thread as without one. A group reward is called when the last image of a group is there.
    """

    rewards: dict[str, Reward]
    plan: Plan
    threaded: bool
    waiting: Callable[[], None] = lambda: None
    images: Tensor = field(default_factory=lambda: torch.empty(0))  # (B, H, W, 3) as far as they are sampled
    seconds: dict[str, float] = field(default_factory=dict)  # of each reward
    saved: float = 0.0  # seconds of scoring for which nothing waited

    def __post_init__(self) -> None:
        count = len(self.plan.texts)
        self.scores = {name: torch.full((count,), torch.nan) for name in self.rewards}
        self.seconds = dict.fromkeys(self.rewards, 0.0)
        self._sampled = torch.zeros(count, dtype=torch.bool)
        self._tasks: SimpleQueue[Any] = SimpleQueue()
        self._error: BaseException | None = None
        self._stopped = False
        # a daemon: a request that does not return must not keep an interrupted run from ending
        self._thread = threading.Thread(target=self._work, daemon=True)
        if self.rewards and self.threaded:
            self._thread.start()

    def add(self, rows: Tensor, images: Tensor) -> None:
        """Take finished images, (rows,), (rows, H, W, 3)."""
        if not len(self.images):
            self.images = images.new_empty(len(self._sampled), *images.shape[1:])
        self.images[rows] = images
        self._sampled[rows] = True
        for name, reward in self.rewards.items():
            for part in self._groups(rows) if isinstance(reward, GroupReward) else [rows]:
                self._tasks.put((name, part, self.images[part]))

    def _groups(self, rows: Tensor) -> list[Tensor]:
        """The groups that these rows complete."""
        size = self.plan.group_size
        groups = [torch.arange(g * size, (g + 1) * size) for g in (rows // size).unique().tolist()]
        return [group for group in groups if self._sampled[group].all()]

    def _work(self) -> None:
        try:
            while not self._stopped and (task := self._tasks.get()) is not None:
                self._score(*task)
        except BaseException as error:  # raised again in the thread that trains
            self._error = error

    def _score(self, name: str, rows: Tensor, images: Tensor) -> None:
        start, texts = time.perf_counter(), self.plan.texts
        prompts = [texts[row] for row in rows.tolist()]
        size = self.plan.group_size if isinstance(self.rewards[name], GroupReward) else None
        self.scores[name][rows] = self.rewards[name].score(images, prompts, size).float().cpu()
        self.seconds[name] += time.perf_counter() - start

    def check(self) -> None:
        """Raise what a reward raised."""
        if self._error is not None:
            raise self._error

    def finish(self) -> dict[str, Tensor]:
        """Wait for the scores of all images, name -> (B,)."""
        start = time.perf_counter()
        self._tasks.put(None)
        if self.rewards and self.threaded:
            while self._thread.is_alive():
                self._thread.join(WAITING_SECONDS)
                self.waiting()
        else:
            self._work()
        self.check()
        self.saved = max(0.0, sum(self.seconds.values()) - (time.perf_counter() - start))
        return self.scores


@contextmanager
def overlapping(overlap: Overlap) -> Iterator[Overlap]:
    """Inside, rewards may score; afterwards they start no further images."""
    try:
        yield overlap
    finally:
        overlap._stopped = True
        overlap._tasks.put(None)
