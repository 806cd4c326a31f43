"""ComfyUI's coordinates and ours.

ComfyUI hands samplers x = x0 + sigma eps for epsilon and v models and x = (1 - t) x0 + t eps, sigma = t, for flow; the
library's ddim steps live in x / sqrt(1 + sigma^2), alpha_bar = 1 / (1 + sigma^2). Every model answers with x0.
"""

from dataclasses import dataclass
from typing import Any, Literal

import comfy.model_sampling
import comfy.samplers
import torch
from torch import Tensor

from comfyui_pcpo.method.schedule import Grid, ddim_grid

from ...trainer.config.schema import ConfigError

VARIANCE_EXPLODING = (comfy.model_sampling.EPS, comfy.model_sampling.V_PREDICTION)
OTHERS = (comfy.model_sampling.IMG_TO_IMG, comfy.model_sampling.IMG_TO_IMG_FLOW)


@dataclass(frozen=True)
class Space:
    """How one model's noise levels and latents translate."""

    kind: Literal["ddim", "flow"]
    sampling: Any

    def grid(self, sigmas: Tensor) -> Grid:
        """Noise levels (T + 1,) as the library's grid."""
        levels = sigmas.detach().to("cpu", torch.float64)
        if self.kind == "ddim":
            timesteps = self.sampling.timestep(sigmas[:-1]).cpu().long()
            return Grid("ddim", 1 / (1 + levels.square()), timesteps)
        return Grid("flow", levels, 1000 * levels[:-1])

    def sigmas(self, grid: Grid) -> Tensor:
        """The host's noise levels of a grid, (T + 1,) float32."""
        levels = (1 / grid.levels - 1).sqrt() if self.kind == "ddim" else grid.levels
        return levels.float()

    def scale(self, sigma: float) -> float:
        """The host's latents are the library's times this."""
        return (1 + sigma**2) ** 0.5 if self.kind == "ddim" else 1.0

    def output(self, x: Tensor, denoised: Tensor, sigma: float) -> Tensor:
        """Epsilon or velocity from the host's x and the predicted x0: both are (x - x0) / sigma."""
        return (x - denoised) / sigma


def space_of(model: Any) -> Space:
    """The space of a MODEL (a patcher). Raises ConfigError for models that are neither epsilon, v nor flow."""
    sampling = model.get_model_object("model_sampling")
    if isinstance(sampling, comfy.model_sampling.CONST) and not isinstance(sampling, OTHERS):
        return Space("flow", sampling)
    if isinstance(sampling, VARIANCE_EXPLODING) and not isinstance(sampling, OTHERS):
        return Space("ddim", sampling)
    kind = ", ".join(base.__name__ for base in type(sampling).__mro__[1:3])
    raise ConfigError(
        f"the model's sampling is {kind}, but PCPO steps exist for 2 kinds: epsilon / v-prediction, and flow. "
        "Use an SD1.5, SD2, SDXL, SD3.5 or FLUX type model."
    )


def training_grid(space: Space, steps: int) -> Grid:
    """The noise levels that the trainer uses: diffusers' DDIM and flow matching grids."""
    sampling = space.sampling
    if space.kind == "ddim" and isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete):
        alphas = 1 / (1 + sampling.sigmas.detach().cpu().double().square())
        return ddim_grid(steps, alphas, len(alphas))
    name = "simple" if isinstance(sampling, comfy.model_sampling.ModelSamplingFlux) else "normal"
    return space.grid(comfy.samplers.calculate_sigmas(sampling, name, steps))
