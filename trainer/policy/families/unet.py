"""SD1.x and SD2.x: a UNet that predicts epsilon or v, one CLIP text encoder, DDIM steps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from comfyui_pcpo.lora.formats import Family
from comfyui_pcpo.method.schedule import Grid, Kind, ddim_grid

from ...config.schema import ConfigError, RolloutConfig
from ...memory.transfer import upload
from .base import Inputs, PipelineAdapter

PREDICTIONS = ("epsilon", "v_prediction")


def check_betas(scheduler: Any) -> None:
    """Refuse a scheduler without DDPM's noise levels, such as EDM's: DDIM would take its own defaults for them."""
    c = scheduler.config
    if c.get("use_flow_sigmas") or (c.get("beta_start") is None and c.get("trained_betas") is None):
        raise ConfigError(
            f"the model's scheduler is {type(scheduler).__name__} without DDPM's betas, but a UNet is trained on ddim "
            "steps, which have them. Use a model whose scheduler has beta_start and beta_end."
        )


class Unet(PipelineAdapter):
    layout: Family = "unet"
    kind: Kind = "ddim"
    token = 1

    def __init__(self, pipeline: Any, rollout: RolloutConfig):
        from diffusers import DDIMScheduler

        super().__init__(pipeline, rollout)
        check_betas(pipeline.scheduler)
        # a pipeline's usual scheduler may be another; DDIM of the same noise levels is what is trained
        self.scheduler: Any = DDIMScheduler.from_config(pipeline.scheduler.config)
        self.alphas: Tensor = self.scheduler.alphas_cumprod
        self.prediction: str = self.scheduler.config.prediction_type
        if self.prediction not in PREDICTIONS:
            raise ConfigError(
                f"the model predicts {self.prediction}, but ddim steps are known for {' and '.join(PREDICTIONS)}. "
                "Use a model of these kinds, or correct prediction_type in its scheduler's configuration."
            )
        if rollout.shift is not None:
            raise ConfigError(f"rollout.shift is {rollout.shift:g}, but only flow models have a shift. Leave it out.")

    def grid(self, steps: int) -> Grid:
        c = self.scheduler.config
        # linspace, other schedulers' default, says nothing about the model
        spacing = "trailing" if c.timestep_spacing == "trailing" else "leading"
        try:
            return ddim_grid(steps, self.alphas, c.num_train_timesteps, steps_offset=c.steps_offset,
                             set_alpha_to_one=c.set_alpha_to_one, spacing=spacing)  # fmt: skip
        except ValueError as error:
            raise ConfigError(f"denoising steps: {error}") from None

    def embed(self, prompts: Sequence[str], device: torch.device) -> Inputs:
        return {"encoder_hidden_states": self.pipeline.encode_prompt(list(prompts), device, 1, False)[0]}

    def call(self, x: Tensor, t: Tensor, text: Inputs) -> Tensor:
        return self.epsilon(self.denoiser(x, t, **text).sample.float(), x, t)

    def epsilon(self, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The model's output as epsilon, (B, C, H, W) -> (B, C, H, W).

        Progressive distillation (arXiv 2202.00512), v = sqrt(ab) eps - sqrt(1 - ab) x0:
            eps = sqrt(ab) v + sqrt(1 - ab) x
        Linear in v with x fixed, so guidance and log-ratios may be taken before or after it.
        """
        if self.prediction == "epsilon":
            return out
        ab = upload(self.alphas, x.device)[t.long()].view(-1, 1, 1, 1)
        return ab.sqrt() * out + (1 - ab).sqrt() * x
