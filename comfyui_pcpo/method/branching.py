"""Branching rollouts: a group shares first noise and an ODE prefix, and its images part at a few stochastic steps."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from comfyui_pcpo.method.rollout import GroupNoise, Predict, Trajectory, check_chunks, predict_rows
from comfyui_pcpo.method.schedule import Grid
from comfyui_pcpo.method.transition import Transition, step


@dataclass(frozen=True)
class Branch:
    """Where the images of one group part: steps start .. start + length - 1 are stochastic, all others ODE steps."""

    start: int
    length: int
    trunk: int  # groups with the same number share prompt, first noise and prefix


@dataclass(frozen=True)
class BranchPlan:
    """One branch per group, and both kinds of every step."""

    branches: Sequence[Branch]  # (P,)
    stochastic: Sequence[Transition]  # (T,)
    deterministic: Sequence[Transition]  # (T,)

    def drawn(self, group_size: int) -> Tensor:
        """Which images draw noise at which step, -> (T, P * G) bool."""
        steps = torch.arange(len(self.stochastic))[:, None]
        start, length = (_per_row([getattr(b, key) for b in self.branches], group_size) for key in ("start", "length"))
        return (steps >= start) & (steps < start + length)

    def representatives(self, group_size: int, chunks: Sequence[Tensor]) -> Tensor:
        """The row that is predicted in place of each row, -> (T, P * G): the first one with the same latent.

        Up to its branch step a group has one latent, and so have the groups of its trunk that part no earlier. At a
        stochastic step the representative is of the row's own chunk, so that the update, which predicts the drawn
        rows of one chunk, repeats the rollout's model call to the bit.
        """
        drawn, count = self.drawn(group_size), group_size * len(self.branches)
        start, trunk = (_per_row([getattr(b, key) for b in self.branches], group_size) for key in ("start", "trunk"))
        chunk = torch.empty(count, dtype=torch.long)
        for number, rows in enumerate(chunks):
            chunk[rows] = number
        result = torch.arange(count).repeat(len(drawn), 1)
        for i in range(len(drawn)):
            shared = start >= i
            kept_apart = torch.where(drawn[i], chunk, -1)
            same = (trunk[:, None] == trunk) & (kept_apart[:, None] == kept_apart) & shared[:, None] & shared
            result[i, shared] = same[shared].int().argmax(1)
        return result


def choose_branches(
    rng: np.random.Generator, trainable: Sequence[int], groups: int, length: int, first: int = 0
) -> list[int]:
    """The branch step of each group, uniform over the trainable steps or over the `first` k of them, -> (P,).

    `length` steps from there on must be trainable. Steps are dealt in shuffled passes, so that the groups of an
    update have different ones as far as possible; each is still uniform. The first k: RSM (arXiv 2604.17415).
    """
    able = set(trainable)
    starts = [s for s in sorted(able) if all(s + j in able for j in range(length))]
    starts = starts[:first] if first else starts
    if length < 1 or not starts:
        raise ValueError(
            f"a branch has {length} stochastic steps, but the trainable steps are {sorted(able)}. "
            "Use 1 up to the number of neighbouring trainable steps."
        )
    passes = -(-groups // len(starts))
    return [int(s) for s in np.concatenate([rng.permutation(starts) for _ in range(passes)])[:groups]]


@torch.no_grad()
def branch_rollout(
    predict: Predict, grid: Grid, plan: BranchPlan, noise: GroupNoise, chunks: Sequence[Tensor]
) -> Trajectory:
    """Sample every image of `noise` along its group's branch, -> Trajectory with its stochastic pairs marked.

    TempFlow-GRPO (arXiv 2508.04324) and BranchGRPO (arXiv 2509.06040): an image's advantage is caused by the noise of
    its branch alone. Noise is drawn as in `rollout`, so a prefix computed once equals one computed for every image.
    """
    check_chunks(noise, chunks)
    _check_branches(plan, noise, grid.steps)
    size, timesteps = noise.group_size, grid.timesteps.tolist()
    x = _trunk_noise(noise.first(), plan, size)
    latents, noises, outs = (x.new_empty((n, *x.shape)) for n in (len(timesteps) + 1, len(timesteps), len(timesteps)))
    latents[0] = x
    path = Trajectory(latents, noises, outs, plan.stochastic, timesteps, plan.drawn(size))
    path.representatives = plan.representatives(size, chunks)
    for i, t in enumerate(timesteps):
        noises[i] = noise.next()
        calls = [(rows, *path.unique_rows(i, rows)) for rows in _calls(path, i, chunks)]
        found = predict_rows(predict, latents[i], t, [unique for _, unique, _ in calls])
        for rows, unique, places in calls:
            outs[i, rows] = found[unique[places]]
            path.evaluations += len(unique)
        drawn = step(latents[i], outs[i], noises[i], plan.stochastic[i])
        ode = step(latents[i], outs[i], noises[i], plan.deterministic[i])
        mask = path.drawn_mask(i).view(-1, *[1] * (x.ndim - 1))
        latents[i + 1] = torch.where(mask, drawn, ode)
    return path


def _calls(path: Trajectory, i: int, chunks: Sequence[Tensor]) -> list[Tensor]:
    """The rows of each model call of step i: the drawn rows of a chunk as in the update, then the others together."""
    mask = path.drawn_mask(i)
    calls = [rows[mask[rows]] for rows in chunks]
    others, largest = torch.cat(list(chunks)), max(map(len, chunks))
    others = others[~mask[others]]
    unique, places = path.unique_rows(i, others)
    for first in range(0, len(unique), largest):
        calls.append(others[(places >= first) & (places < first + largest)])
    return [rows for rows in calls if len(rows)]


def _trunk_noise(first: Tensor, plan: BranchPlan, group_size: int) -> Tensor:
    """First noise of every image, that of the first group of its trunk, (P * G, C, H, W) -> the same."""
    trunks = [branch.trunk for branch in plan.branches]
    return first[_per_row([trunks.index(trunk) * group_size for trunk in trunks], group_size)]


def _per_row(values: Sequence[int], group_size: int) -> Tensor:
    return torch.tensor(values).repeat_interleave(group_size)


def _check_branches(plan: BranchPlan, noise: GroupNoise, steps: int) -> None:
    if not noise.shared_first:
        raise ValueError(
            "shared_noise is false, but a branch needs one first noise per group. Set shared_noise = true."
        )
    if len(plan.branches) != len(noise.generators):
        raise ValueError(f"there are {len(plan.branches)} branches for {len(noise.generators)} groups. Give one each.")
    for branch in plan.branches:
        if branch.start < 0 or branch.length < 1 or branch.start + branch.length > steps:
            raise ValueError(
                f"a branch covers steps {branch.start} to {branch.start + branch.length - 1}, but there are steps 0 to "
                f"{steps - 1}. Use a shorter or an earlier branch."
            )
        for i in range(branch.start, branch.start + branch.length):
            if plan.stochastic[i].std == 0:
                raise ValueError(f"step {i} of a branch has std 0, so its images would not part. Branch elsewhere.")
