"""An exponential moving average of the LoRA's weights: smoother than those of any one update, and what a run keeps."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class LoraEma:
    """diffusers' EMAModel of `parameters`, taken after every `every`-th optimizer step.

    Flow-GRPO (arXiv 2505.05470), code:  ema <- d ema + (1 - d) p,  d = min(decay, (1 + n) / (10 + n)),
    with n the optimizer steps so far, so that the first values are soon forgotten.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float, every: int):
        from diffusers.training_utils import EMAModel  # heavy, and few runs keep an EMA

        self.parameters, self.every, self.steps = list(parameters), every, 0
        together = self.parameters[0].device.type == "cuda"  # one kernel for many factors
        self.model: Any = EMAModel(self.parameters, decay=decay, foreach=together)

    @property
    def values(self) -> list[Tensor]:
        """The averaged parameters."""
        return self.model.shadow_params

    def step(self) -> None:
        """Count an optimizer step; every `every`-th one enters the average."""
        self.steps += 1
        if self.steps % self.every == 0:
            self.model.optimization_step = self.steps  # EMAModel's n is one less than its own count
            self.model.step(self.parameters)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the parameters are the averaged ones."""
        latest = [p.detach().clone() for p in self.parameters]
        self._overwrite(self.values)
        try:
            yield
        finally:
            self._overwrite(latest)

    @torch.no_grad()
    def _overwrite(self, values: Sequence[Tensor]) -> None:
        torch._foreach_copy_([p.detach() for p in self.parameters], list(values))

    @torch.no_grad()
    def restart(self, steps: int, values: Sequence[Tensor] | None = None) -> None:
        """Continue after so many optimizer steps, from `values` or from the parameters as they are."""
        self.steps = steps
        for own, value in zip(self.values, values or self.parameters, strict=True):
            own.copy_(value)
