"""A running average of the LoRA's weights: smoother than the weights of any one update, and what is used afterwards."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """Exponential moving average of `parameters`, taken after every `every`-th optimizer step.

    Flow-GRPO (arXiv 2505.05470), code:  average <- d average + (1 - d) p,  d = min(decay, (1 + n) / (10 + n)),
    with n the optimizer steps so far, so that the first values are soon forgotten.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float, every: int):
        self.parameters, self.decay, self.every = list(parameters), decay, every
        self.values = [p.detach().clone() for p in self.parameters]
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        """Count an optimizer step; every `every`-th one enters the average."""
        self.steps += 1
        if self.steps % self.every:
            return
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for value, p in zip(self.values, self.parameters, strict=True):
            value.lerp_(p, 1 - decay)

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """Inside, the parameters are the average."""
        own = [p.detach().clone() for p in self.parameters]
        self._write(self.values)
        try:
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: Sequence[Tensor]) -> None:
        for p, value in zip(self.parameters, values, strict=True):
            p.copy_(value)

    def restart(self, steps: int) -> None:
        """Take the parameters as they are for the average after so many optimizer steps."""
        self.values = [p.detach().clone() for p in self.parameters]
        self.steps = steps
