"""What a run changes: the LoRA, its average, the optimizer, the window of rewards."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from comfyui_pcpo.method.advantage import PromptWindow

from ..config.schema import Config
from ..policy.base import Policy
from .ema import Average
from .optimizer import make_optimizer


@dataclass
class TrainingState:
    """What changes while a run goes on, and so what a checkpoint holds."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    window: PromptWindow
    average: Average | None = None
    done: int = 0  # updates finished

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Whatever ends the body early leaves LoRA, its average, optimizer, window and count as they were before it."""
        parameters, done = self.policy.trainable(), self.done
        values = cloned([p.detach() for p in parameters])
        optimizer, window = cloned(self.optimizer.state_dict()), copy.deepcopy(self.window.state_dict())
        average = cloned(self.average.values) if self.average else []
        steps = self.average.steps if self.average else 0
        try:
            yield
        except BaseException:
            with torch.no_grad():
                for p, value in zip(parameters, values, strict=True):
                    p.copy_(value)
                    p.grad = None
            self.optimizer.load_state_dict(optimizer)
            self.window.load_state_dict(window)
            self.done = done
            if self.average:
                self.average.values, self.average.steps = (
                    [v.to(p) for v, p in zip(average, parameters, strict=True)],
                    steps,
                )
            raise


def cloned(tree: Any) -> Any:
    """A state dict whose tensors are copies in the computer's memory, which takes none of a GPU's."""
    if isinstance(tree, Tensor):
        return tree.to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: cloned(value) for key, value in tree.items()}
    return [cloned(value) for value in tree] if isinstance(tree, list) else tree


def make_training_state(policy: Policy, config: Config) -> TrainingState:
    o = config.optimizer
    optimizer = make_optimizer(policy.trainable(), o)
    average = Average(policy.trainable(), o.ema_decay, o.ema_every) if o.ema_decay else None
    return TrainingState(policy, optimizer, PromptWindow(config.advantage.window, config.advantage.min_count), average)
