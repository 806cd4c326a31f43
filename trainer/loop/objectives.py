"""What an update minimises: a surrogate on the stored trajectory, or a loss on the forward process.

The loop depends on the interface `Objective` alone. A new loss on the trajectory is one line in
`comfyui_pcpo.method.surrogate.OBJECTIVES`; a new kind of objective is a class here and its line in `make_objective`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from comfyui_pcpo.method.credit import level_weights, loss_weights, target_weights
from comfyui_pcpo.method.forward_process import (
    ALL_OBJECTIVES,
    FORWARD_OBJECTIVES,
    LIKELIHOODS,
    ForwardSettings,
    image_scale,
    noised,
    output_distance,
    scales,
    target,
)
from comfyui_pcpo.method.rollout import GroupNoise, Predict, Trajectory, predict_rows
from comfyui_pcpo.method.samplers import Method, default_noise_level
from comfyui_pcpo.method.schedule import Grid
from comfyui_pcpo.method.surrogate import FORMS, OBJECTIVES, kl
from comfyui_pcpo.method.transition import Transition
from comfyui_pcpo.method.trust_region import kl_mask, kl_masked

from ..config.schema import AdvantageConfig, Config, ObjectiveConfig
from ..memory.transfer import upload
from .plan import Plan, StepRules


@dataclass(frozen=True)
class Terms:
    """One denoising step of some images, each (b,)."""

    log_ratio: Tensor
    loss: Tensor
    clipped: Tensor  # bool: the term lies in its flat region


@dataclass(frozen=True)
class StepRows:
    """Images of which one denoising step is predicted in one model call."""

    i: int  # the step
    rows: Tensor  # (b,) of this process's images
    measured: Tensor  # (b,) bool: on which of them the KL is measured
    together: bool = False  # whether all processes predict with the reference, because one may measure


class Objective(StepRules, Protocol):
    """What the loop asks of an objective."""

    def kept(self, path: Trajectory) -> Trajectory:
        """What `prepare` needs of a rollout whose images are decoded; the rest of its memory is free then."""
        ...

    def prepare(self, path: Trajectory, plan: Plan, noise: GroupNoise, predict: Predict) -> Trajectory:
        """What the update replays; `noise` is independent of the rollout's.

        On the forward process `noises` of the result are the errors of `outs`.
        """
        ...

    def terms(self, path: Trajectory, plan: Plan, step: StepRows, out: Tensor, advantage: Tensor) -> Terms:
        """Log-ratio and loss of a step from the new output (b, C, H, W) and the advantages (b,)."""
        ...

    def divergence(self, d_ref: Tensor, plan: Plan, i: int) -> Tensor:
        """Distance of step i to the reference from the difference of outputs, (b, C, H, W) -> (b,)."""
        ...


@dataclass(frozen=True)
class OnTrajectory:
    """A surrogate of the ratio of each stored denoising step: ppo, log_hinge, matching."""

    config: ObjectiveConfig

    def noise_level(self, method: Method) -> float:
        return default_noise_level(method)

    def trainable(self, steps: Sequence[Transition]) -> list[int]:
        return [i for i, step in enumerate(steps) if step.std > 0]

    def weights(self, steps: Sequence[Transition], grid: Grid, trainable: Sequence[int]) -> Tensor:
        return target_weights(steps, grid, self.config.credit, trainable, self.config.rescale_credit)

    def loss_weights(self, steps: Sequence[Transition], grid: Grid, trainable: Sequence[int]) -> Tensor:
        return loss_weights(steps, grid, self.config.loss_weight, trainable)

    def kept(self, path: Trajectory) -> Trajectory:
        return path

    def prepare(self, path: Trajectory, plan: Plan, noise: GroupNoise, predict: Predict) -> Trajectory:
        return path

    def terms(self, path: Trajectory, plan: Plan, step: StepRows, out: Tensor, advantage: Tensor) -> Terms:
        o, i, old, noise = self.config, step.i, *stored(path, step, out.device)
        weight, native, surrogate = float(plan.steps.weights[i]), plan.transitions[i].weight, OBJECTIVES[o.name]

        log_ratio = FORMS[o.form](out - old, noise, weight, native)
        loss = surrogate.loss(log_ratio, advantage, o.clip_range)

        if not o.kl_mask:
            return Terms(log_ratio, loss, surrogate.clipped(log_ratio.detach(), advantage, o.clip_range))
        dropped = kl_mask(kl(out.detach() - old, plan.transitions[i]), log_ratio, advantage, o.kl_mask)
        kept = kl_masked(log_ratio, dropped)  # before the exponential too: that of a far one has a gradient of NaN
        return Terms(log_ratio, kl_masked(surrogate.unclipped(kept, advantage, o.clip_range), dropped), dropped)

    def divergence(self, d_ref: Tensor, plan: Plan, i: int) -> Tensor:
        return kl(d_ref, plan.transitions[i])


@dataclass(frozen=True)
class OnForwardProcess:
    """A loss of finished samples that are noised again: awm, nft. Their steps need no noise of their own."""

    config: ObjectiveConfig
    advantage: AdvantageConfig

    def noise_level(self, method: Method) -> float:
        return 0.0

    def trainable(self, steps: Sequence[Transition]) -> list[int]:
        return list(range(len(steps)))

    def weights(self, steps: Sequence[Transition], grid: Grid, trainable: Sequence[int]) -> Tensor:
        return torch.ones(grid.steps, dtype=torch.float64)

    def loss_weights(self, steps: Sequence[Transition], grid: Grid, trainable: Sequence[int]) -> Tensor:
        return level_weights(grid, self.config.level_credit, trainable)

    def kept(self, path: Trajectory) -> Trajectory:
        """The final latents, in memory of their own."""
        final = path.latents[-1:].clone()
        return replace(path, latents=final, noises=torch.empty(0), outs=torch.empty(0))

    @torch.no_grad()
    def prepare(self, path: Trajectory, plan: Plan, noise: GroupNoise, predict: Predict) -> Trajectory:
        """Re-noise the final latents at every trained step and predict them with the current model."""
        x0, grid, levels = path.final, plan.grid, scales(plan.grid)
        latents, outs, errors = (torch.zeros(grid.steps, *x0.shape) for _ in range(3))
        for i in plan.trained:
            eps = noise.first() if self.config.shared_noise else noise.next()
            latents[i] = noised(x0, eps, levels[i])
            outs[i] = predict_rows(predict, latents[i], path.timesteps[i], plan.chunks)
            errors[i] = outs[i] - target(x0, eps, grid.kind)
        everywhere = torch.ones(grid.steps, len(x0), dtype=torch.bool)
        made = path.evaluations + len(x0) * len(plan.trained)
        return Trajectory(latents, errors, outs, path.transitions, path.timesteps, everywhere, evaluations=made)

    def terms(self, path: Trajectory, plan: Plan, step: StepRows, out: Tensor, advantage: Tensor) -> Terms:
        o, i, old, error = self.config, step.i, *stored(path, step, out.device)
        settings = ForwardSettings(o.clip_range, self.advantage.clip, o.nft_beta, o.likelihood)
        scale, forward = image_scale(scales(plan.grid)[i], plan.grid.kind), FORWARD_OBJECTIVES[o.name]

        log_ratio = LIKELIHOODS[o.likelihood](out - old, error)
        loss = forward.loss(out - old, error, advantage, scale, settings)

        return Terms(log_ratio, loss, forward.clipped(log_ratio.detach(), advantage, o.clip_range))

    def divergence(self, d_ref: Tensor, plan: Plan, i: int) -> Tensor:
        return output_distance(d_ref)


def stored(path: Trajectory, step: StepRows, device: torch.device) -> tuple[Tensor, Tensor]:
    """The old outputs of a step and its noises (on the forward process: errors), each (b, C, H, W)."""
    return upload(path.outs[step.i, step.rows], device), upload(path.noises[step.i, step.rows], device)


def make_objective(config: Config) -> Objective:
    """The configured objective."""
    if ALL_OBJECTIVES[config.objective.name].replays_steps:
        return OnTrajectory(config.objective)
    return OnForwardProcess(config.objective, config.advantage)
