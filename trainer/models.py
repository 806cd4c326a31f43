"""Loads a diffusers pipeline: the embedded models, a local folder, or a hub name."""

from pathlib import Path
from typing import Any

import torch

from .config import ConfigError

TINY = Path(__file__).parents[1] / "comfyui_pcpo" / "tiny" / "models"
EMBEDDED = ("emoji-flow", "emoji-eps")


def tiny_folder() -> Path:
    """Where the embedded models are, also in an installed package."""
    import comfyui_pcpo

    return Path(comfyui_pcpo.__file__).parent / "tiny" / "models"


def load_pipeline(name: str) -> Any:
    """A diffusers pipeline in float32 on the CPU. Raises ConfigError with the missing or broken file's name."""
    if name in EMBEDDED:
        return load_tiny(name)
    import diffusers

    try:
        return diffusers.DiffusionPipeline.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.name {name} could not be loaded: {error}. Use {', '.join(EMBEDDED)}, a folder that "
            "save_pretrained wrote, or the name of a model that this computer has or can download."
        ) from error


def load_tiny(name: str) -> Any:
    """An embedded model as the plain diffusers pipeline of its kind."""
    import diffusers
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    root = tiny_folder()
    shared = root / "shared"
    try:
        vae = diffusers.AutoencoderTiny.from_pretrained(shared / "vae", torch_dtype=torch.float32)
        tokenizer = CLIPTokenizer.from_pretrained(shared / "tokenizer")
        text = {"torch_dtype": torch.float32}
        if name == "emoji-eps":
            return diffusers.StableDiffusionPipeline(
                vae=vae,
                text_encoder=CLIPTextModel.from_pretrained(shared / "text_encoder", **text),
                tokenizer=tokenizer,
                unet=diffusers.UNet2DConditionModel.from_pretrained(root / name / "unet", **text),
                scheduler=diffusers.DDIMScheduler.from_pretrained(root / name / "scheduler"),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        encoder = CLIPTextModelWithProjection.from_pretrained(shared / "text_encoder", **text)
        return diffusers.StableDiffusion3Pipeline(
            vae=vae,
            text_encoder=encoder,
            text_encoder_2=encoder,
            text_encoder_3=None,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            tokenizer_3=None,
            transformer=diffusers.SD3Transformer2DModel.from_pretrained(root / name / "transformer", **text),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(root / name / "scheduler"),
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"the embedded model {name} under {root} is damaged: {error}. Install the package again."
        ) from error
