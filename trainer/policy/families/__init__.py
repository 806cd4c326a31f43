"""The kinds of diffusers pipelines that can be trained: an entry each."""

from typing import Any

from ...config.schema import ConfigError, RolloutConfig
from .base import Inputs, PipelineAdapter, TextRows, denoiser_of
from .chroma import Chroma
from .flux import Flux
from .flux2 import Flux2
from .krea2 import Krea2
from .qwen import QwenImage
from .qwen21 import QwenImage21
from .sd3 import Sd3
from .sdxl import Sdxl
from .unet import Unet
from .z_image import ZImage

FAMILIES: dict[str, type[PipelineAdapter]] = {
    "StableDiffusionPipeline": Unet,
    "StableDiffusionXLPipeline": Sdxl,
    "StableDiffusion3Pipeline": Sd3,
    "FluxPipeline": Flux,
    "ChromaPipeline": Chroma,
    "Flux2Pipeline": Flux2,
    "Flux2KleinPipeline": Flux2,
    "Krea2Pipeline": Krea2,
    "QwenImagePipeline": QwenImage,
    "QwenImage21Pipeline": QwenImage21,
    "ZImagePipeline": ZImage,
}


def make_adapter(pipeline: Any, rollout: RolloutConfig) -> PipelineAdapter:
    """The adapter of a pipeline. Raises ConfigError for a kind that has no entry."""
    name = type(pipeline).__name__
    if name not in FAMILIES:
        raise ConfigError(f"{name} is not a supported pipeline. Supported are {', '.join(FAMILIES)}.")
    return FAMILIES[name](pipeline, rollout)


__all__ = ["FAMILIES", "Inputs", "PipelineAdapter", "TextRows", "denoiser_of", "make_adapter"]
