"""What the trainer must know of one kind of diffusers pipeline; each kind is a small subclass in its own file."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from comfyui_pcpo.lora.formats import Family
from comfyui_pcpo.method.schedule import Grid, Kind, flow_grid, flow_grid_from_sigmas

from ...config.schema import ConfigError, RolloutConfig

TextRows = Tensor | list[Tensor]
"""A row per prompt: one tensor, or a list of them where each text keeps its own length."""
Inputs = dict[str, Any]
"""The denoiser's text inputs by name, as TextRows."""


class PipelineAdapter:
    """How a pipeline's parts go together: prompts to inputs, inputs to the denoiser, latents to images.

    The defaults are those of a flow transformer on the latents of a plain VAE.
    """

    layout: Family = "sd3"  # names of the exported LoRA
    kind: Kind = "flow"
    pretends = True  # whether real weights have contentless copies
    token = 2  # side of the latent square that the denoiser reads as one token

    def __init__(self, pipeline: Any, rollout: RolloutConfig):
        self.pipeline, self.rollout = pipeline, rollout
        self.denoiser: Any = denoiser_of(pipeline)
        self.latent_shape = (self.channels(), *self._sides())

    def check_sharded(self) -> None:
        """Raise ConfigError where processes might make different numbers of model calls, which FSDP makes together."""

    def channels(self) -> int:
        """Channels of the latent."""
        return self.denoiser.config.in_channels

    def default_side(self) -> int:
        """Side of the model's own latent."""
        return self.denoiser.config.sample_size

    def pixels(self) -> int:
        """Side of the square of pixels that a position of the latent stands for."""
        return self.pipeline.vae_scale_factor

    def longest_side(self) -> int | None:
        """Longest side of a latent that the denoiser has positions for; None without a limit."""
        return None

    def _sides(self) -> tuple[int, int]:
        scale = self.pixels()
        sides, multiple = [], scale * self.token
        for name, pixels in (("height", self.rollout.height), ("width", self.rollout.width)):
            pixels = pixels or self.default_side() * scale
            if pixels % multiple:
                raise ConfigError(f"rollout.{name} {pixels} is not a multiple of {multiple}. Use one, such as "
                                  f"{max(multiple, pixels // multiple * multiple)}.")  # fmt: skip
            most = self.longest_side()
            if most is not None and pixels > most * scale:
                raise ConfigError(
                    f"rollout.{name} {pixels} is beyond the model's positions. Use at most {most * scale}."
                )
            sides.append(pixels // scale)
        return sides[0], sides[1]

    def grid(self, steps: int) -> Grid:
        """The noise levels that the pipeline itself would use for the rollout's image size."""
        if self.rollout.shift is not None:
            return flow_grid(steps, self.rollout.shift)
        scheduler = euler(self.pipeline.scheduler)
        self.space(scheduler, steps, resolution_mu(self.latent_shape, self.token, scheduler.config))
        return flow_grid_from_sigmas(scheduler.sigmas)

    def space(self, scheduler: Any, steps: int, mu: float | None) -> None:
        """Set the scheduler's noise levels as the pipeline does."""
        scheduler.set_timesteps(steps, mu=mu)

    def embed(self, prompts: Sequence[str], device: torch.device) -> Inputs:
        """Text inputs of the denoiser, a row per prompt."""
        raise NotImplementedError

    def call(self, x: Tensor, t: Tensor, text: Inputs) -> Tensor:
        """Epsilon or velocity without guidance, (B, C, H, W) and the scheduler's timesteps (B,) -> (B, C, H, W)."""
        raise NotImplementedError

    def guide(self, uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance as the pipeline applies it, (B, C, H, W) -> (B, C, H, W)."""
        return uncond + scale * (cond - uncond)

    def decode(self, latents: Tensor) -> Tensor:
        """Clean latents (B, C, H, W) -> images (B, 3, H, W) in [-1, 1]."""
        c = self.pipeline.vae.config
        z = latents / c.scaling_factor + (getattr(c, "shift_factor", None) or 0.0)
        return self.pipeline.vae.decode(z).sample


def euler(scheduler: Any) -> Any:
    """A copy of a flow model's scheduler, whose levels can be set without changing the pipeline. Raises ConfigError."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise ConfigError(
            f"the model's scheduler is {type(scheduler).__name__}, but noise levels are only read from a "
            "FlowMatchEulerDiscreteScheduler. Set rollout.shift, or use a model with that scheduler."
        )
    return copy.copy(scheduler)


def resolution_mu(latent_shape: tuple[int, int, int], token: int, config: Any) -> float | None:
    """Log of the resolution shift, linear in the number of tokens; None where the scheduler has a fixed shift.

    SD3 (arXiv 2403.03206), section 5.3.2; base and maximum are the scheduler's.
    """
    if not config.get("use_dynamic_shifting"):
        return None
    tokens = latent_shape[1] * latent_shape[2] / token**2
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return base + (top - base) * (tokens - low) / (high - low)


def denoiser_of(pipeline: Any) -> Any:
    """The UNet or the transformer of a pipeline."""
    return getattr(pipeline, "unet", None) or pipeline.transformer
