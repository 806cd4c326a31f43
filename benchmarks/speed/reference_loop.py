"""A lower bound on the cost of an update: the same model calls, forward and backward, and nothing else."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.config.schema import Config
from trainer.loop.plan import Plan

from .measuring import device_clock


@torch.no_grad()
def bare_rollout(policy: Any, condition: Any, steps: Sequence[float], chunks: Sequence[Tensor]) -> None:
    """One forward pass per step and chunk, then the decoder."""
    batches = [condition.rows(rows.tolist()) for rows in chunks]
    latents = [torch.randn(len(rows), *policy.latent_shape, device=policy.device) for rows in chunks]
    for t in steps:
        for x, batch in zip(latents, batches, strict=True):
            policy.predict(x, t, batch)
    for x in latents:
        policy.decode(x)


def bare_update(
    policy: Any, optimizer: torch.optim.Optimizer, condition: Any, steps: Sequence[float], chunks: Sequence[Tensor]
) -> None:
    """One forward and backward pass per step and chunk, then the optimizer."""
    batches = [condition.rows(rows.tolist()) for rows in chunks]
    latents = [torch.randn(len(rows), *policy.latent_shape, device=policy.device) for rows in chunks]
    for t in steps:
        for x, batch in zip(latents, batches, strict=True):
            policy.predict(x, t, batch).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def reference_seconds(policy: Any, config: Config, plan: Plan) -> float:
    """Seconds of the reference loop over the chunks and the steps of a plan."""
    condition, times = policy.encode(config.prompts.read()), plan.grid.timesteps.tolist()
    minibatches = [[rows // config.rollout.group_size for rows in minibatch] for minibatch in plan.minibatches]
    optimizer = torch.optim.SGD(policy.trainable(), lr=0.0)
    start = device_clock(policy.device)
    bare_rollout(policy, condition, times, [chunk for minibatch in minibatches for chunk in minibatch])
    for minibatch in minibatches:
        bare_update(policy, optimizer, condition, [times[i] for i in plan.trained], minibatch)
    return device_clock(policy.device) - start
