"""Checks of connected models, latents, conditionings and VAEs, before any work starts."""

import logging
from collections.abc import Sequence
from typing import Any

import comfy.model_base
import comfy.model_sampling
from torch import Tensor

from ...trainer.config.schema import ConfigError
from .ksampler import latent_samples

logger = logging.getLogger("pcpo")


def check_latent(model: Any, latent: dict[str, Any]) -> Tensor:
    """The tensor of a LATENT for this model. Raises ConfigError where channels, dimensions or size do not fit."""
    samples, wanted = latent_samples(model, latent), model.model.latent_format
    if samples.ndim != 2 + wanted.latent_dimensions or samples.shape[1] != wanted.latent_channels:
        raise ConfigError(
            f"latent_image has the shape {tuple(samples.shape)}, but this model needs {wanted.latent_channels} "
            f"channels and {wanted.latent_dimensions} dimensions. Use Empty Latent Image, or encode the image with the "
            "VAE of the model."
        )
    core = model.model.diffusion_model
    most, patch = getattr(core, "pos_embed_max_size", None), getattr(core, "patch_size", None)
    if isinstance(most, int) and isinstance(patch, int) and max(samples.shape[-2:]) > most * patch:
        limit = most * patch * wanted.spacial_downscale_ratio
        height, width = (int(n) * wanted.spacial_downscale_ratio for n in samples.shape[-2:])
        raise ConfigError(
            f"latent_image is for {width} x {height} pixels, but this model's positions end at {limit} x {limit}. "
            "Use a smaller latent."
        )
    return samples


def check_training_latent(model: Any, latent: dict[str, Any]) -> Tensor:
    """As `check_latent`, for training and comparing, where the latent sets the size only: one frame, no mask."""
    if latent.get("noise_mask") is not None:
        raise ConfigError("latent_image has a noise mask, which would be ignored here. Connect an empty latent.")
    if len(latent["samples"]) != 1:
        logger.warning("PCPO: latent_image sets the image size only; its batch_size has no effect.")
    samples = check_latent(model, latent)
    image_shape(samples)
    return samples


def image_shape(latent: Tensor) -> tuple[int, int, int]:
    """(C, H, W) of one image from a latent (B, C, H, W), or (B, C, 1, H, W) of a video model."""
    if latent.ndim == 5 and latent.shape[2] > 1:
        raise ConfigError(
            f"the latent has {latent.shape[2]} frames, but rewards score images. Connect a latent of length 1."
        )
    channels, *_, height, width = latent.shape[1:]
    return channels, height, width


def check_conditioning(model: Any, conds: Sequence[Any], name: str = "conditioning") -> None:
    """Raise ConfigError if a conditioning has another width than the model's, as that of another model's CLIP has."""
    wanted = context_width(model.model)
    for cond in conds:
        for tensor, _ in cond:
            if wanted and isinstance(tensor, Tensor) and tensor.shape[-1] != wanted:
                raise ConfigError(
                    f"{name} has width {tensor.shape[-1]}, but the model needs {wanted}: it was encoded with another "
                    "model's CLIP. Connect the CLIP that belongs to the model."
                )


def context_width(model: Any) -> int | None:
    """The width of the text embeddings that a model takes; None where it is not known."""
    config = model.model_config.unet_config
    if isinstance(model, comfy.model_base.Flux):
        width = config.get("context_in_dim")
    elif isinstance(model, comfy.model_base.SD3):
        width = config.get("context_embedder_config", {}).get("params", {}).get("in_features")
    else:
        width = config.get("context_dim") if "model_channels" in config else None
    return width if isinstance(width, int) else None


def check_vae(model: Any, vae: Any) -> None:
    """Raise ConfigError if a VAE decodes latents with another number of channels than the model's."""
    wanted, own = model.model.latent_format.latent_channels, vae.latent_channels
    if own != wanted:
        raise ConfigError(
            f"vae decodes latents of {own} channels, but the model makes {wanted}. Connect the VAE of the model."
        )


def check_same_kind(base: Any, aligned: Any, number: int) -> None:
    """Raise ConfigError if predictions of two models cannot be combined."""
    kinds = [(type(m.model.latent_format).__name__, predicts_flow(m)) for m in (base, aligned)]
    if kinds[0] != kinds[1]:
        words = [
            f"{'flow matching' if flow else 'epsilon or v prediction'} in {space} latents" for space, flow in kinds
        ]
        raise ConfigError(
            f"aligned model {number} is of another kind than the base model ({words[1]}; base: {words[0]}), so their "
            "predictions cannot be combined. Use models of one family."
        )


def predicts_flow(model: Any) -> bool:
    return isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST)
