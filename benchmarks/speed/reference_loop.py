"""The least that an update can cost: the same model calls, forward and backward, and nothing else."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def roll_out(policy: Any, condition: Any, steps: Sequence[float], chunks: Sequence[Tensor]) -> None:
    """One forward pass per step and chunk, then the decoder."""
    batches = [condition.rows(rows.tolist()) for rows in chunks]
    latents = [torch.randn(len(rows), *policy.latent_shape, device=policy.device) for rows in chunks]
    for t in steps:
        for x, batch in zip(latents, batches, strict=True):
            policy.predict(x, t, batch)
    for x in latents:
        policy.decode(x)


def train(
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
