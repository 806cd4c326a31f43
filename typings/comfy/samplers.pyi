from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .model_base import BaseModel
from .model_patcher import ModelPatcher

SAMPLER_NAMES: list[str]
SCHEDULER_NAMES: list[str]

class Sampler:
    def max_denoise(self, model_wrap: Any, sigmas: Tensor) -> bool: ...

class KSAMPLER(Sampler):
    def __init__(self, sampler_function: Callable[..., Tensor], extra_options: dict[str, Any] = ...) -> None: ...

class CFGGuider:
    model_patcher: ModelPatcher
    inner_model: BaseModel
    conds: dict[str, Any]
    original_conds: dict[str, list[dict[str, Any]]]
    cfg: float

    def __init__(self, model_patcher: ModelPatcher) -> None: ...
    def set_conds(self, positive: Any, negative: Any) -> None: ...
    def set_cfg(self, cfg: float) -> None: ...
    def inner_set_conds(self, conds: dict[str, Any]) -> None: ...
    def inner_sample(self, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor: ...
    def predict_noise(
        self, x: Tensor, timestep: Tensor, model_options: Any = ..., seed: int | None = None
    ) -> Tensor: ...
    def sample(
        self,
        noise: Tensor,
        latent_image: Tensor,
        sampler: Sampler,
        sigmas: Tensor,
        denoise_mask: Tensor | None = None,
        callback: Callable[..., None] | None = None,
        disable_pbar: bool = False,
        seed: int | None = None,
    ) -> Tensor: ...

class KSampler:
    sigmas: Tensor
    def __init__(
        self, model: ModelPatcher, steps: int, device: torch.device, sampler: str, scheduler: str, denoise: float
    ) -> None: ...

def calc_cond_batch(
    model: BaseModel, conds: Sequence[Any], x_in: Tensor, timestep: Tensor, model_options: Any
) -> list[Tensor]: ...
def calculate_sigmas(model_sampling: Any, scheduler_name: str, steps: int) -> Tensor: ...
def cfg_function(
    model: BaseModel,
    cond_pred: Tensor,
    uncond_pred: Tensor,
    cond_scale: float,
    x: Tensor,
    timestep: Tensor,
    model_options: Any = ...,
    cond: Any = None,
    uncond: Any = None,
) -> Tensor: ...
def sampler_object(name: str) -> KSAMPLER: ...
