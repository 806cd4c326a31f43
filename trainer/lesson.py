"""What the gradient steps of one update learn from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from comfyui_pcpo.rollout import Trajectory

from .config import Config
from .plan import Plan
from .policy import Policy

if TYPE_CHECKING:
    from .forward_update import Renoised

Predict = Callable[[Tensor, float, Tensor], Tensor]
"""(latents, timestep, rows of the update's pictures) -> the model's output."""


@dataclass(frozen=True)
class Lesson:
    """One update's stored steps, what became of them, and whom to ask again; of this process's B pictures."""

    plan: Plan
    path: "Trajectory | Renoised"
    advantage: Tensor  # (B,)
    predict: Predict
    policy: Policy
    config: Config
