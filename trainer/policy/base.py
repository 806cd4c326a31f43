"""What the loop needs of a model. Two implementations: diffusers_policy here, nodes/host/policy.py in the nodes."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from comfyui_pcpo.lora.formats import Family
from comfyui_pcpo.method.schedule import Grid

LoraPairs = dict[str, tuple[Tensor, Tensor]]
"""Module name -> (down (r, in, ...), up (out, r, ...))."""


Progress = Callable[[int, int], None]
"""Called with the number that is done, and that of all."""


def no_progress(done: int, total: int) -> None:
    """Report nothing."""


class Condition(Protocol):
    """Encoded prompts; the loop only ever picks rows of it."""

    def rows(self, index: Sequence[int]) -> "Condition":
        """The condition of a batch: one row per image."""
        ...


class Policy(Protocol):
    """A text-to-image model with a LoRA that can be switched off."""

    kind: Literal["ddim", "flow"]
    family: Family  # names the LoRA layout, comfyui_pcpo/lora/families.py
    latent_shape: tuple[int, int, int]  # (C, H, W) of one image
    device: torch.device

    def grid(self, steps: int) -> Grid:
        """The noise levels that the model's own scheduler uses for so many steps."""
        ...

    def encode(self, prompts: Sequence[str], progress: Progress = no_progress) -> Condition:
        """One row per prompt; called once per run. `progress` is called with how many of them are encoded."""
        ...

    def predict(self, x: Tensor, timestep: float, condition: Any) -> Tensor:
        """Model output (epsilon or velocity, guidance applied), (B, C, H, W) -> (B, C, H, W) float32."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Clean latents (B, C, H, W) -> images (B, H, W, 3) in [0, 1] on the CPU."""
        ...

    def trainable(self) -> list[nn.Parameter]:
        """The LoRA's parameters, float32, always in the same order."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside, the LoRA is off."""
        ...

    def lora(self) -> LoraPairs:
        """The LoRA's factors by module, detached."""
        ...

    def load_lora(self, pairs: LoraPairs) -> None:
        """Overwrite the LoRA's factors; refuses other modules or shapes."""
        ...
