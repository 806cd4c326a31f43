"""Conversion between ComfyUI's latents and noise levels and the library's.

ComfyUI's samplers get x = x0 + sigma eps for epsilon and v models, and x = (1 - t) x0 + t eps, sigma = t, for flow
models; the library's ddim steps use x / sqrt(1 + sigma^2), alpha_bar = 1 / (1 + sigma^2). Cosmos is a flow model that
gets x0 + sigma eps: t = sigma / (1 + sigma), and the flow's x is x / (1 + sigma). Every model returns x0.
"""

from dataclasses import dataclass
from typing import Any, Literal

import comfy.model_sampling
import comfy.samplers
import torch
from torch import Tensor

from comfyui_pcpo.method.schedule import Grid, Spacing, ddim_grid

from ...trainer.config.presets import timestep_spacing
from ...trainer.config.schema import ConfigError
from .origin import file_name

VARIANCE_EXPLODING = (comfy.model_sampling.EPS, comfy.model_sampling.V_PREDICTION)
UNSUPPORTED = (comfy.model_sampling.IMG_TO_IMG, comfy.model_sampling.IMG_TO_IMG_FLOW)


@dataclass(frozen=True)
class Space:
    """Conversion of one model's noise levels and latents."""

    kind: Literal["ddim", "flow"]
    sampling: Any
    exploding: bool  # ComfyUI's latents are x0 + sigma eps
    spacing: Spacing = "leading"  # of ddim's timesteps

    @property
    def timesteps(self) -> int | None:
        """How many the model knows; None: any number between 0 and 1000."""
        discrete = isinstance(self.sampling, comfy.model_sampling.ModelSamplingDiscrete)
        return len(self.sampling.sigmas) if self.kind == "ddim" and discrete else None

    def grid(self, sigmas: Tensor) -> Grid:
        """ComfyUI's sigmas (T + 1,) as the library's grid."""
        levels = sigmas.detach().to("cpu", torch.float64)
        if self.kind == "ddim":
            times = self.sampling.timestep(sigmas[:-1]).cpu()
            return Grid("ddim", 1 / (1 + levels.square()), times.long() if self.timesteps else times.double())
        levels = levels / (1 + levels) if self.exploding else levels
        return Grid("flow", levels, 1000 * levels[:-1])

    def sigmas(self, grid: Grid) -> Tensor:
        """ComfyUI's sigmas of a grid, (T + 1,) float32."""
        if self.kind == "ddim":
            return (1 / grid.levels - 1).sqrt().float()
        return (grid.levels / (1 - grid.levels) if self.exploding else grid.levels).float()

    def scale(self, sigma: float) -> float:
        """Factor from the library's latents to ComfyUI's."""
        if self.kind == "ddim":
            return (1 + sigma**2) ** 0.5
        return 1 + sigma if self.exploding else 1.0

    def output(self, x: Tensor, denoised: Tensor, sigma: float) -> Tensor:
        """Epsilon or velocity from ComfyUI's x and the predicted x0: epsilon is (x - x0) / sigma, so is CONST's v."""
        out = (x - denoised) / sigma
        return out - denoised if self.kind == "flow" and self.exploding else out


def space_of(model: Any) -> Space:
    """The space of a MODEL (a patcher). Raises ConfigError for models that are neither epsilon, v nor flow."""
    sampling = model.get_model_object("model_sampling")
    if isinstance(sampling, comfy.model_sampling.CONST) and not isinstance(sampling, UNSUPPORTED):
        return Space("flow", sampling, exploding=False)
    if isinstance(sampling, comfy.model_sampling.COSMOS_RFLOW):
        return Space("flow", sampling, exploding=True)
    if isinstance(sampling, VARIANCE_EXPLODING) and not isinstance(sampling, UNSUPPORTED):
        return Space("ddim", sampling, exploding=True, spacing=timestep_spacing(file_name(model)))
    kind = ", ".join(base.__name__ for base in type(sampling).__mro__[1:3])
    raise ConfigError(
        f"the model's sampling type is {kind}, but PCPO supports epsilon prediction, v-prediction and flow matching. "
        "docs/models.md lists the tested models."
    )


def training_grid(space: Space, steps: int) -> Grid:
    """The trainer's noise levels: the DDIM or flow matching grid of diffusers, as it spaces a single file's."""
    sampling = space.sampling
    if space.timesteps:
        alphas = 1 / (1 + sampling.sigmas.detach().cpu().double().square())
        return ddim_grid(steps, alphas, space.timesteps, spacing=space.spacing)
    name = "simple" if isinstance(sampling, comfy.model_sampling.ModelSamplingFlux) else "normal"
    return space.grid(comfy.samplers.calculate_sigmas(sampling, name, steps))
