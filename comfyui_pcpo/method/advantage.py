"""Rewards to advantages: per group, per prompt window, several rewards.

A reward of NaN is a failed sample: it leaves every statistic, its advantage is 0, and the update leaves out its loss.
An advantage of 0 has no gradient, but for nft, whose loss is then least where the model is the old one.
Standard deviations are the population's (divided by n, as numpy's), in float64 or the rewards' own width if wider.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Spread = Literal["group", "batch"]


@dataclass(frozen=True)
class AdvantageRule:
    """What rewards are compared with, the constants of a run."""

    kind: Literal["group", "window"] = "group"
    spread: Spread = "group"  # of kind group
    standardise: bool = True  # several rewards; a single one never is
    bound: float = 5.0


@dataclass(frozen=True)
class ScoredGroups:
    """Rewards of all groups and their advantages, each (P, G)."""

    combined: Tensor  # one reward per image, NaN where a trained one failed
    advantage: Tensor  # within +-bound, 0 where a reward failed


def score_groups(
    scores: Tensor, weights: Sequence[float], rule: AdvantageRule, prompts: Sequence[str], window: PromptWindow
) -> ScoredGroups:
    """Scores of K rewards to one and its advantages, (K, P, G) -> two of (P, G), float32 or wider.

    `window` takes in the rewards. A single reward (weights of 0 do not count) enters as it is: a z-score within its
    group would make spread = batch and kind = window do nothing. Several are standardised, if at all, over the
    advantage's own population:

        group           z_k = (r_k - group mean) / (group std + eps)      DanceGRPO (arXiv 2505.07818)
        group, batch    z_k = (r_k - batch mean) / (batch std + eps)      Flow-GRPO (arXiv 2505.05470), code
        window          z_k = (r_k - prompt mean) / (prompt std + eps)    DDPO (arXiv 2305.13301)

    sum_k weight_k z_k is then centred and divided by the spread of the same population.
    """
    trained = [k for k, weight in enumerate(weights) if weight != 0] or list(range(len(weights)))
    scores, weights = scores[trained], [weights[k] for k in trained]
    standardise = rule.standardise and len(trained) > 1
    if rule.kind == "window" and standardise:
        combined, advantage = window.advantage_of_several(prompts, scores, weights)
    else:
        combined = combine_rewards(scores, weights, standardise, population=rule.spread)
        grouped = rule.kind == "group"
        advantage = group_advantage(combined, rule.spread) if grouped else window.advantage(prompts, combined)
    return ScoredGroups(combined, clip_advantage(advantage, rule.bound))


def group_advantage(rewards: Tensor, spread: Spread = "group", eps: float = 1e-4) -> Tensor:
    """Advantage of each image among those of its prompt, (P, G) -> (P, G) float32 or wider.

    DanceGRPO (arXiv 2505.07818):  A = (r - group mean) / (std + eps)
    std of the group, or over the whole batch as in Flow-GRPO's code. A group without spread has advantage 0.
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


def combine_rewards(
    rewards: Tensor,
    weights: Sequence[float],
    standardise: bool = True,
    eps: float = 1e-4,
    population: Spread = "group",
) -> Tensor:
    """One reward from K, (K, P, G) -> (P, G) float32 or wider; NaN where any of the K failed.

    sum_k weight_k z_k,  z_k = (r_k - mean) / (std + eps) over the group or the batch;  standardise=False: raw sum
    """
    _check(rewards, 3, standardise)
    if len(weights) != len(rewards):
        raise ValueError(f"there are {len(weights)} weights for {len(rewards)} rewards. Give one weight per reward.")
    failed = rewards.isnan().any(0)
    _check(rewards[0].masked_fill(failed, torch.nan), 2, standardise)
    r = rewards.double().masked_fill(failed, torch.nan)
    if standardise:
        centred, std = _centre(r if population == "group" else r.flatten(1))
        r = _divide(centred, std + eps).view(r.shape)
    return torch.einsum("k,kpg->pg", r.new_tensor(weights), r).to(_width(rewards))


def failed_share(rewards: Tensor) -> float:
    """Share of failed samples, those with a reward of NaN, any shape -> [0, 1]."""
    return rewards.isnan().double().mean().item()


class PromptWindow:
    """Advantages against a running window of each prompt's own rewards.

    DDPO (arXiv 2305.13301), per-prompt normalization; the code's PerPromptStatTracker: the new rewards enter first,
    and a prompt with fewer than `min_count` of them uses the batch's statistics. `of` names the rewards, in JSON.
    """

    def __init__(self, size: int = 32, min_count: int = 16, eps: float = 1e-6, of: Any = None) -> None:
        if not 1 <= min_count <= size:
            raise ValueError(
                f"min_count is {min_count} and size {size}, but a window must be able to hold min_count >= 1 rewards. "
                "Use size 32 and min_count 16."
            )
        self.size = size
        self.min_count = min_count
        self.eps = eps
        self.of = of
        self.windows: dict[str, deque[Any]] = {}  # of numbers, or of K numbers

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

    def advantage_of_several(
        self, prompts: Sequence[str], scores: Tensor, weights: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """Standardise K rewards in a prompt's window and compare their sum there, (K, P, G) -> two of (P, G).

        c = sum_k weight_k (r_k - mean_k) / (std_k + eps) has mean 0 over the window; the advantage is c over its std.
        The window holds the K raw rewards of each sample, so that all are standardised by today's statistics.
        """
        _check(scores, 3, grouped=False)
        rows = scores.double().flatten(1).T.cpu()  # (P * G, K)
        rows = rows.masked_fill(rows.isnan().any(1, keepdim=True), torch.nan)
        _check(rows[:, 0], 1)
        names = [prompt for prompt in prompts for _ in range(scores.shape[2])]
        for prompt, row in zip(names, rows, strict=True):
            if not row.isnan().any():
                self.windows.setdefault(prompt, deque(maxlen=self.size)).append(row.tolist())
        pairs = []
        for prompt, row in zip(names, rows, strict=True):
            peers = self._statistics(prompt, rows)
            mean = peers.nanmean(0)
            std = _std(peers.T, mean)
            factor = torch.where(std > 0, rows.new_tensor(weights) / (std + self.eps), 0.0)
            combined = ((row - mean) * factor).sum()
            pairs.append(torch.stack([combined, self._score(combined, ((peers - mean) * factor).sum(1))]))
        combined, advantage = torch.stack(pairs).T.view(2, *scores.shape[1:]).to(scores.device, _width(scores))
        return combined, advantage.nan_to_num(nan=0.0)

    def _statistics(self, prompt: str, batch: Tensor) -> Tensor:
        """The rewards a prompt is compared with: its window, or the batch while the window is short, -> (N, ...)."""
        window = self.windows.get(prompt, ())
        return batch if len(window) < self.min_count else torch.tensor(window, dtype=torch.float64)

    def _score(self, value: Tensor, peers: Tensor) -> Tensor:
        mean = peers.nanmean()
        std = _std(peers, mean)
        return (value - mean) / (std + self.eps) if std > 0 else torch.zeros_like(value)

    def state_dict(self) -> dict[str, Any]:
        """The rewards as plain Python, for a checkpoint; the sizes are the configuration's."""
        return {"windows": {prompt: list(window) for prompt, window in self.windows.items()}, "of": self.of}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; of a longer window, with the newest rewards, and of other rewards with none."""
        windows = state["windows"] if state.get("of", self.of) == self.of else {}
        self.windows = {prompt: deque(values, maxlen=self.size) for prompt, values in windows.items()}


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
