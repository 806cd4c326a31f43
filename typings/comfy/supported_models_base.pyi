from typing import Any

import torch
from torch import Tensor

from .latent_formats import LatentFormat
from .model_base import BaseModel

class ClipTarget:
    def __init__(self, tokenizer: type, clip: type) -> None: ...

class BASE:
    unet_extra_config: dict[str, Any]
    latent_format: type[LatentFormat]
    memory_usage_factor: float

    def __init__(self, unet_config: dict[str, Any]) -> None: ...
    def inpaint_model(self) -> bool: ...
    def set_inference_dtype(self, dtype: torch.dtype, manual_cast_dtype: torch.dtype | None) -> None: ...
    def get_model(self, state_dict: dict[str, Tensor], prefix: str = "") -> BaseModel: ...
