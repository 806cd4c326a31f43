"""Muon in float32: PyTorch's computes in bfloat16, which takes ten times as long on a CPU without it."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

STEPS, QUINTIC = 5, (3.4445, -4.7750, 2.0315)  # of the iteration; kellerjordan.github.io/posts/muon


class Muon(torch.optim.Optimizer):
    """Steps along orthogonalized momentum; matrices of one shape are orthogonalized together.

    The size of a step is scaled to that of AdamW at the same rate (0.2 sqrt of the longer side, arXiv 2502.16982).
    """

    def __init__(self, matrices: Iterable[Tensor], lr: float, weight_decay: float = 0.01, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    alike[matrix.shape].append(matrix)
            for matrices in alike.values():
                self.turn(matrices, group)

    def turn(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        """One step of the matrices, all of one shape; a convolution's has a row for each output channel."""
        gradients = torch.stack([matrix.grad for matrix in matrices if matrix.grad is not None])
        momenta = torch.stack([self.state[m].get("momentum_buffer", torch.zeros_like(m)) for m in matrices])
        momenta.lerp_(gradients, 1 - group["momentum"])
        directions = gradients.lerp(momenta, group["momentum"]).flatten(2)  # Nesterov's look ahead
        scale = 0.2 * max(directions.shape[1:]) ** 0.5
        updates = orthogonal(directions).view_as(gradients)
        for matrix, momentum, update in zip(matrices, momenta, updates, strict=True):
            self.state[matrix]["momentum_buffer"] = momentum.clone()
            matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def orthogonal(matrices: Tensor) -> Tensor:
    """Nearly U V^T of each matrix's singular value decomposition, (N, A, B) -> (N, A, B), by Newton and Schulz."""
    a, b, c = QUINTIC
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
