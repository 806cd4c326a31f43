from typing import Any

import torch
from torch import Tensor

from .model_patcher import ModelPatcher
from .supported_models_base import ClipTarget
from .taesd.taesd import TAESD

class CLIP:
    cond_stage_model: Any
    def __init__(
        self, target: ClipTarget, *, parameters: int, model_options: dict[str, Any], disable_dynamic: bool = False
    ) -> None: ...

class VAE:
    first_stage_model: TAESD
    def __init__(self, sd: dict[str, Tensor], *, dtype: torch.dtype | None = None) -> None: ...
    def encode(self, pixel_samples: Tensor) -> Tensor: ...
    def decode(self, samples_in: Tensor) -> Tensor: ...

def load_lora_for_models(
    model: ModelPatcher, clip: CLIP | None, lora: dict[str, Tensor], strength_model: float, strength_clip: float
) -> tuple[ModelPatcher, CLIP | None]: ...
