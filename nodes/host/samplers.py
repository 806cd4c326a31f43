"""The stochastic samplers as a sampling function of ComfyUI's KSAMPLER."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from comfyui_pcpo.method.ddim_variance import SIGMAS, Sigma, smallest_target
from comfyui_pcpo.method.rollout import Trajectory, derive_seed
from comfyui_pcpo.method.samplers import METHODS, default_noise_level, resolve_method, transitions
from comfyui_pcpo.method.schedule import Grid, Kind
from comfyui_pcpo.method.transition import Transition, log_prob, mean

from ..types import RecordedTrajectory
from .spaces import Space, space_of

METHOD_NAMES = ["auto", *METHODS]
SIGMA_NAMES = list(SIGMAS)
PUBLISHED_LEVEL = -1.0  # noise_level widget: use the published value of the method


@dataclass(frozen=True)
class StepChoice:
    """The widgets of a stochastic sampler; `target` 0 solves for the smallest feasible weight."""

    method: str = "auto"
    noise_level: float = PUBLISHED_LEVEL
    sigma: Sigma = "native"
    target: float = 0.0
    s_noise: float = 1.0
    trainer_start: bool = False  # start from pure noise as the trainer does, not from noise at the first level
    trainer_end: bool = False  # return the last latent as clean, whatever noise its alpha_bar implies

    def resolve(self, kind: Kind) -> tuple[str, float]:
        method = resolve_method(self.method, kind)
        return method, default_noise_level(method) if self.noise_level < 0 else self.noise_level

    def transitions(self, grid: Grid) -> list[Transition]:
        method, level = self.resolve(grid.kind)
        target = None
        if self.sigma != "native" and grid.kind == "ddim":
            target = self.target or smallest_target(grid) * 1.0001
        return transitions(grid, method, level, self.sigma, target)


@dataclass
class Recorder:
    """Collects one sampling run as a trajectory."""

    latents: list[Tensor] = field(default_factory=list)
    noises: list[Tensor] = field(default_factory=list)
    outs: list[Tensor] = field(default_factory=list)
    steps: list[Transition] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)

    def add(self, x: Tensor, noise: Tensor, out: Tensor, step: Transition) -> None:
        self.latents.append(x.float().cpu())
        self.noises.append(noise)
        self.outs.append(out.float().cpu())
        self.steps.append(step)

    def trajectory(self) -> RecordedTrajectory:
        latents, noises, outs = (torch.stack(t) for t in (self.latents, self.noises, self.outs))
        path = Trajectory(latents, noises, outs, self.steps, self.timesteps)
        scores = torch.stack([log_prob(z, step) for z, step in zip(path.noises, self.steps, strict=True)])
        return RecordedTrajectory(path, torch.tensor([s.weight for s in self.steps], dtype=torch.float64), scores)


class StochasticSampler(comfy.samplers.KSAMPLER):
    """KSAMPLER with stochastic steps; noise masks, previews and denoise below 1 are ComfyUI's."""

    def __init__(self, choice: StepChoice, recorder: Recorder | None = None):
        super().__init__(sample_steps, {"choice": choice, "recorder": recorder})
        self.choice = choice

    def max_denoise(self, model_wrap: Any, sigmas: Tensor) -> bool:
        return self.choice.trainer_start or super().max_denoise(model_wrap, sigmas)


@torch.no_grad()
def sample_steps(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any],
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    *,
    choice: StepChoice,
    recorder: Recorder | None = None,
) -> Tensor:
    """Sample along `sigmas`; step noise is drawn on the CPU from its own generator. One sigma is no step."""
    if len(sigmas) < 2:
        return x
    space = space_of(model.inner_model.model_patcher)
    grid = space.grid(sigmas)
    steps, levels = choice.transitions(grid), sigmas.tolist()
    generator = torch.Generator().manual_seed(derive_seed(int(extra_args.get("seed") or 0), 1))
    x = x / space.scale(levels[0])
    if recorder is not None:
        recorder.latents.append(x.float().cpu())
        recorder.timesteps = grid.timesteps.tolist()
    for i, step in enumerate(steps):
        scaled = x * space.scale(levels[i])
        denoised = model(scaled, sigmas[i].expand(len(x)), **extra_args)
        if callback is not None:
            callback({"x": scaled, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        out = space.output(scaled, denoised, levels[i])
        noise = torch.randn(x.shape, generator=generator)
        x = mean(x, out, step)
        if step.std:
            x = x + choice.s_noise * step.std * noise.to(x)
        if recorder is not None:
            recorder.add(x, noise, out, step)
    return finish(model, x, space, levels[-1], extra_args, choice)


def finish(model: Any, x: Tensor, space: Space, sigma: float, extra_args: dict[str, Any], choice: StepChoice) -> Tensor:
    """The final latent in ComfyUI's scale; masked parts of a clean latent are restored exactly."""
    clean = choice.trainer_end or sigma == 0
    x, mask = x if clean else x * space.scale(sigma), extra_args.get("denoise_mask")
    return x * mask + model.latent_image * (1 - mask) if clean and mask is not None else x
