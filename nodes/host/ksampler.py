"""Sampling as ComfyUI's KSampler does it, on the trainer's noise schedule or on ComfyUI's own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ...trainer.config.schema import ConfigError
from ..types import EncodedPrompts
from .decode import decode_images
from .presets import recipe
from .samplers import StepChoice, StochasticSampler
from .spaces import space_of, training_grid

TRAINING_SCHEDULER = "training"
EMBEDDED_SIDE = 128  # pixels


def noise_levels(model: Any, scheduler: str, steps: int, denoise: float = 1.0) -> Tensor:
    """The sigmas of a run, (T + 1,); with denoise below 1, the last T of a longer schedule."""
    if denoise <= 0:
        return torch.zeros(0)
    space, total = space_of(model), steps if denoise >= 1 else int(steps / denoise)
    if scheduler == TRAINING_SCHEDULER:
        if space.timesteps and total > space.timesteps:
            raise ConfigError(
                f"{steps} steps at denoise {denoise:g} are the last of {total}, but the model has "
                f"{space.timesteps} timesteps. Use fewer steps, a larger denoise, or another scheduler."
            )
        sigmas = space.sigmas(training_grid(space, total))
    else:
        sigmas = comfy.samplers.calculate_sigmas(space.sampling, scheduler, total)
    return sigmas.cpu()[-(steps + 1) :]


def cfg_guider(model: Any, positive: Any, negative: Any, cfg: float) -> comfy.samplers.CFGGuider:
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


def latent_samples(model: Any, latent: dict[str, Any]) -> Tensor:
    """The tensor of a LATENT; an empty one gets the channels and the size that the model needs."""
    return comfy.sample.fix_empty_latent_channels(
        model, latent["samples"], latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal")
    )


def sample_latent(
    guider: comfy.samplers.CFGGuider, seed: int, sampler: comfy.samplers.Sampler, sigmas: Tensor, latent: dict[str, Any]
) -> dict[str, Any]:
    """Sample from a LATENT as KSampler does: channels, seeded noise, noise mask and live preview."""
    callback = latent_preview.prepare_callback(guider.model_patcher, len(sigmas) - 1)
    return _sample(guider, seed, sampler, (sigmas, latent), callback)


def _sample(guider: Any, seed: int, sampler: Any, start: tuple[Tensor, dict[str, Any]], callback: Any) -> dict:
    sigmas, latent = start
    samples = latent_samples(guider.model_patcher, latent)
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    quiet = not comfy.utils.PROGRESS_BAR_ENABLED
    result = guider.sample(noise, samples, sampler, sigmas, latent.get("noise_mask"), callback, quiet, seed)
    kept = {k: v for k, v in latent.items() if not k.startswith("downscale_ratio")}
    return {**kept, "samples": result.to(comfy.model_management.intermediate_device())}


def _interruptible(*args: object) -> None:
    """A callback without a preview, which still stops at Cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()


@dataclass(frozen=True)
class ImageRequest:
    """One deterministic image per prompt, from the same noise for every model."""

    vae: Any
    prompts: EncodedPrompts
    latent: dict[str, Any]
    seed: int
    steps: int
    cfg: float

    def generate(self, model: Any, tick: Callable[[int], object] = lambda count: None) -> Tensor:
        """(P, H, W, 3), with `tick` after each; an image's noise depends on the seed and the prompt's position."""
        first = {key: value for key, value in self.latent.items() if key != "batch_index"}
        first["samples"] = self.latent["samples"][:1]
        sampler = StochasticSampler(StepChoice(noise_level=0.0, trainer_start=True, trainer_end=True))
        sigmas = noise_levels(model, TRAINING_SCHEDULER, self.steps)
        images = []
        for position, positive in enumerate(self.prompts.positive):
            guider = cfg_guider(model, positive, self.prompts.negative, self.cfg)
            latent = _sample(guider, (self.seed + position) % 2**64, sampler, (sigmas, first), _interruptible)
            images.append(decode_images(self.vae, latent["samples"]))
            tick(1)
        return torch.cat(images)


def empty_latent(model: Any) -> dict[str, Any]:
    """A square latent of the model's own size."""
    latents = model.model.latent_format
    side = EMBEDDED_SIDE if "pcpo_model" in model.attachments else recipe(model).own_side
    size = side // latents.spacial_downscale_ratio
    return {"samples": torch.zeros(1, latents.latent_channels, size, size)}


def with_lora(model: Any, lora: dict[str, Tensor]) -> Any:
    """The MODEL with a LoRA at full strength. Raises ConfigError if none of its keys belong to the model."""
    loaded = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)[0]
    if sum(map(len, loaded.patches.values())) == sum(map(len, model.patches.values())):
        raise ConfigError(
            f"none of the LoRA's {len(lora)} keys belong to this model, so before and after would be equal. Connect a "
            "LoRA that was trained on this model."
        )
    return loaded


def ksampler_sigmas(model: Any, sampler_name: str, scheduler: str, steps: int, denoise: float) -> Tensor:
    """The noise schedule that ComfyUI's KSampler node would use."""
    return comfy.samplers.KSampler(model, steps, model.load_device, sampler_name, scheduler, denoise).sigmas
