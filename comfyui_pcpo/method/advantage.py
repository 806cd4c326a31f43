"""Rewards to advantages: per group, per prompt window, several rewards.

A reward of NaN is a failed sample: it leaves every statistic and its advantage is 0.
Standard deviations are the population's (divided by n, as numpy's), in float64 or the rewards' own width if wider.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Spread = Literal["group", "batch"]


def group_advantage(rewards: Tensor, spread: Spread = "group", eps: float = 1e-4) -> Tensor:
    """Advantage of each image among those of its prompt, (P, G) -> (P, G) float32 or wider.

    DanceGRPO (arXiv 2505.07818):  A = (r - group mean) / (std + eps)
    std of the group, or over the whole batch as in Flow-GRPO's code. A group without spread trains nothing.
    """
    if spread not in ("group", "batch"):
        raise ValueError(f"spread is {spread!r}, but the std is taken over the 'group' or the 'batch'.")
    _check(rewards, 2)
    r = rewards.double()
    centred, std = _centre(r)
    if spread == "batch":
        std = _std(r.flatten(), r.nanmean())
    return _divide(centred, std + eps).nan_to_num(nan=0.0).to(_width(rewards))


def clip_advantage(advantage: Tensor, bound: float = 5.0) -> Tensor:
    """Advantages within +-bound, any shape.  DDPO (arXiv 2305.13301), code: adv_clip_max = 5"""
    if not bound > 0:
        raise ValueError(
            f"bound is {bound}, but advantages are clipped to +-bound. Use a positive number (5 is usual)."
        )
    return advantage.clamp(-bound, bound)


def combine_rewards(rewards: Tensor, weights: Sequence[float], standardise: bool = True, eps: float = 1e-4) -> Tensor:
    """One reward from K, (K, P, G) -> (P, G) float32 or wider; NaN where any of the K failed.

    sum_k weight_k z_k,  z_k = (r_k - group mean) / (group std + eps);  with standardise=False the raw weighted sum
    """
    _check(rewards, 3, standardise)
    if len(weights) != len(rewards):
        raise ValueError(f"there are {len(weights)} weights for {len(rewards)} rewards. Give one weight per reward.")
    failed = rewards.isnan().any(0)
    _check(rewards[0].masked_fill(failed, torch.nan), 2, standardise)
    r = rewards.double().masked_fill(failed, torch.nan)
    if standardise:
        centred, std = _centre(r)
        r = _divide(centred, std + eps)
    return torch.einsum("k,kpg->pg", r.new_tensor(weights), r).to(_width(rewards))


def failed_share(rewards: Tensor) -> float:
    """Share of failed samples, those with a reward of NaN, any shape -> [0, 1]."""
    return rewards.isnan().double().mean().item()


class PromptWindow:
    """Advantages against a running window of each prompt's own rewards.

    DDPO (arXiv 2305.13301), per-prompt normalization; the code's PerPromptStatTracker: the new rewards enter first,
    and a prompt with fewer than `min_count` of them uses the batch's statistics.
    """

    def __init__(self, size: int = 32, min_count: int = 16, eps: float = 1e-6) -> None:
        if not 1 <= min_count <= size:
            raise ValueError(
                f"min_count is {min_count} and size {size}, but a window must be able to hold min_count >= 1 rewards. "
                "Use size 32 and min_count 16."
            )
        self.size = size
        self.min_count = min_count
        self.eps = eps
        self.windows: dict[str, deque[float]] = {}

    def advantage(self, prompts: Sequence[str], rewards: Tensor) -> Tensor:
        """Take in the rewards of a batch, one prompt per row, and return their advantages, (P, G) or (B,) -> the same.

        Float32 or wider.
        """
        if len(prompts) != len(rewards):
            raise ValueError(
                f"there are {len(prompts)} prompts for {len(rewards)} rows of rewards. Give one prompt per row."
            )
        flat = rewards.flatten()
        _check(flat, 1)
        r = flat.double().cpu()
        names = [prompt for prompt in prompts for _ in range(len(r) // len(prompts))]
        for prompt, reward in zip(names, r.tolist(), strict=True):
            if reward == reward:  # NaN is a failed sample
                self.windows.setdefault(prompt, deque(maxlen=self.size)).append(reward)
        out = [self._score(value, self._statistics(prompt, r)) for prompt, value in zip(names, r, strict=True)]
        return torch.stack(out).nan_to_num(nan=0.0).reshape(rewards.shape).to(rewards.device, _width(rewards))

    def _statistics(self, prompt: str, batch: Tensor) -> Tensor:
        """The rewards a prompt is compared with: its window, or the batch while the window is short, -> (N,)."""
        window = self.windows.get(prompt, ())
        return batch if len(window) < self.min_count else torch.tensor(window, dtype=torch.float64)

    def _score(self, value: Tensor, peers: Tensor) -> Tensor:
        mean = peers.nanmean()
        std = _std(peers, mean)
        return (value - mean) / (std + self.eps) if std > 0 else torch.zeros_like(value)

    def state_dict(self) -> dict[str, Any]:
        """The window as plain Python, for a checkpoint."""
        return {
            "size": self.size,
            "min_count": self.min_count,
            "eps": self.eps,
            "windows": {prompt: list(window) for prompt, window in self.windows.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; the sizes are part of the state."""
        self.size, self.min_count, self.eps = int(state["size"]), int(state["min_count"]), float(state["eps"])
        self.windows = {prompt: deque(values, maxlen=self.size) for prompt, values in state["windows"].items()}


def _width(rewards: Tensor) -> torch.dtype:
    return torch.promote_types(rewards.dtype, torch.float32)


def _std(r: Tensor, mean: Tensor) -> Tensor:
    """Population std over the last axis without its NaN, exactly 0 where all values are one, (..., N) -> (...)."""
    low = r.nan_to_num(nan=torch.inf).amin(-1)
    high = r.nan_to_num(nan=-torch.inf).amax(-1)
    return (r - mean.unsqueeze(-1)).square().nanmean(-1).sqrt().masked_fill(low >= high, 0.0)


def _centre(r: Tensor) -> tuple[Tensor, Tensor]:
    """Deviations from the group mean and the group std, (..., G) -> (..., G), (..., 1).

    The mean of equal numbers is off by a rounding error, which a division by eps would blow up: such a group is 0.
    """
    mean = r.nanmean(-1)
    std = _std(r, mean).unsqueeze(-1)
    centred = r - mean.unsqueeze(-1)
    return torch.where((std == 0) & ~r.isnan(), 0.0, centred), std


def _divide(centred: Tensor, spread: Tensor) -> Tensor:
    """centred / spread, where 0 stays 0 even if eps and the std are 0."""
    return torch.where(centred == 0, centred, centred / spread)


def _check(rewards: Tensor, ndim: int, grouped: bool = True) -> None:
    """Refuse the wrong shape, groups of one if `grouped`, infinities, and a batch in which everything failed."""
    if rewards.ndim != ndim:
        shape = {1: "(B,)", 2: "(P, G)", 3: "(K, P, G)"}[ndim]
        raise ValueError(f"rewards have shape {tuple(rewards.shape)}, but {shape} is expected. Reshape them.")
    if grouped and ndim > 1 and rewards.shape[-1] < 2:
        raise ValueError(
            f"group_size is {rewards.shape[-1]}, but advantages compare images of one prompt. "
            "Use 2 or more (8 is a good start)."
        )
    if rewards.isinf().any():
        raise ValueError(
            f"{int(rewards.isinf().sum())} rewards are infinite, but a reward is a number, or NaN for a failed sample. "
            "Check the reward."
        )
    if rewards.isnan().all():
        raise ValueError(
            f"all {rewards.numel()} samples failed (reward NaN), so nothing can be compared. "
            "Check the reward's messages."
        )
