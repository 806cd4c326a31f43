"""The update of the forward-process objectives: final latents are noised again instead of replaying the trajectory."""

import torch
from torch import Tensor

from comfyui_pcpo.method.forward_process import image_scale, matching_log_ratio, nft, noised, scales, target
from comfyui_pcpo.method.rollout import GroupNoise, Trajectory
from comfyui_pcpo.method.surrogate import ppo

from .plan import Plan
from .update_batch import Predict, Renoised, UpdateBatch


@torch.no_grad()
def renoise(path: Trajectory, plan: Plan, noise: GroupNoise, predict: Predict) -> Renoised:
    """Noise a rollout's final latents afresh at every trained step and predict them with the model as it is now."""
    x0, grid = path.final, plan.grid
    times = grid.timesteps.tolist()
    latents, outs, errors = (torch.zeros(grid.steps, *x0.shape) for _ in range(3))
    levels = scales(grid)
    for i in plan.trained:
        eps = noise.next()
        latents[i] = noised(x0, eps, levels[i])
        for rows in (rows for part in plan.minibatches for rows in part):
            outs[i, rows] = predict(latents[i, rows], times[i], rows).float().cpu()
        errors[i] = outs[i] - target(x0, eps, grid.kind)
    return Renoised(latents, outs, errors, [image_scale(level, grid.kind) for level in levels], times)


def forward_terms(lesson: UpdateBatch, path: Renoised, i: int, rows: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """(log-ratio, loss) of renoised samples under awm or nft, each (len(rows),); nft only watches the log-ratio."""
    o, error = lesson.config.objective, path.errors[i, rows].to(d.device)
    advantage = lesson.advantage[rows].to(d.device)
    log_ratio = matching_log_ratio(d, error)
    if o.name == "awm":
        return log_ratio, ppo(log_ratio, advantage, o.clip_range)
    return log_ratio, nft(d, error, advantage, path.scales[i], lesson.config.advantage.clip, o.nft_beta)
