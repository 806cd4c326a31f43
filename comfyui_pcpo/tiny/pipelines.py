"""The embedded models as the plain diffusers pipelines of their kinds. diffusers is imported when one is loaded."""

from pathlib import Path
from typing import Any

import torch

from comfyui_pcpo.tiny.tail import with_tail

MODELS = Path(__file__).parent / "models"
SHARED = MODELS / "shared"
EMBEDDED = ("emoji-flow", "emoji-eps")


def load_tiny_autoencoder(shared: Path = SHARED) -> Any:
    """AutoencoderTiny of both models, float32 on the CPU; its decoder ends with a Tail, which is faster."""
    from diffusers import AutoencoderTiny

    vae: Any = AutoencoderTiny.from_pretrained(shared / "vae", torch_dtype=torch.float32, use_safetensors=True)
    vae.decoder.layers = with_tail(vae.decoder.layers)
    return vae


def load_tiny(name: str, root: Path = MODELS) -> Any:
    """StableDiffusion3Pipeline (emoji-flow) or StableDiffusionPipeline (emoji-eps), float32 on the CPU.

    Call the former with max_sequence_length=0: it has no T5, and diffusers would pad for one.
    """
    import diffusers as library
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    diffusers: Any = library
    if name not in EMBEDDED:
        raise ValueError(f"{name} is not an embedded model. Use one of {', '.join(EMBEDDED)}.")
    shared = root / "shared"
    wide: dict[str, Any] = {"torch_dtype": torch.float32}
    strict = {**wide, "use_safetensors": True}
    vae = load_tiny_autoencoder(shared)
    tokenizer = CLIPTokenizer.from_pretrained(shared / "tokenizer")
    if name == "emoji-eps":
        return diffusers.StableDiffusionPipeline(
            vae=vae,
            text_encoder=CLIPTextModel.from_pretrained(shared / "text_encoder", **wide),
            tokenizer=tokenizer,
            unet=diffusers.UNet2DConditionModel.from_pretrained(root / name / "unet", **strict),
            scheduler=diffusers.DDIMScheduler.from_pretrained(root / name / "scheduler"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    encoder = CLIPTextModelWithProjection.from_pretrained(shared / "text_encoder", **wide)
    return diffusers.StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=encoder,
        text_encoder_2=encoder,
        text_encoder_3=None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=None,
        transformer=diffusers.SD3Transformer2DModel.from_pretrained(root / name / "transformer", **strict),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(root / name / "scheduler"),
    )
