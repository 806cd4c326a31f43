"""What the gradient steps of one update learn from."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from comfyui_pcpo.method.rollout import Trajectory

from ..config.schema import Config
from ..policy.base import Policy
from .plan import Plan

Predict = Callable[[Tensor, float, Tensor], Tensor]
"""(latents, timestep, rows of the update's pictures) -> the model's output."""


@dataclass
class Renoised:
    """Final latents noised to the level of each step; tensors float32. Steps that are not trained are left out as 0."""

    latents: Tensor  # (T, B, C, H, W)
    outs: Tensor  # (T, B, C, H, W) what the model that made the samples predicts there
    errors: Tensor  # (T, B, C, H, W) that, minus what a perfect model would say
    scales: list[float]  # (T,) k of x0_predicted - x0 = -k error
    timesteps: list[float]


@dataclass(frozen=True)
class UpdateBatch:
    """One update's stored steps, what became of them, and whom to ask again; of this process's B pictures."""

    plan: Plan
    path: Trajectory | Renoised
    advantage: Tensor  # (B,)
    predict: Predict
    policy: Policy
    config: Config
