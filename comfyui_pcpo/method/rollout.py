"""Trajectories: images sampled from a policy, with everything the update needs to recompute each step exactly."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from comfyui_pcpo.method.schedule import Grid
from comfyui_pcpo.method.transition import Transition, step

Predict = Callable[[Tensor, float, Tensor], Tensor]
"""(latents (B, C, H, W), the model's timestep, rows (B,)) -> model output (B, C, H, W)."""


@dataclass
class Trajectory:
    """One rollout. All tensors float32 on `latents.device`; step i leads from latents[i] to latents[i + 1]."""

    latents: Tensor  # (T + 1, B, C, H, W)
    noises: Tensor  # (T, B, C, H, W)
    outs: Tensor  # (T, B, C, H, W)
    transitions: Sequence[Transition]
    timesteps: Sequence[float]
    stochastic: Tensor | None = None  # (T, B) bool, which images drew noise at which step; None: as the transitions
    representatives: Tensor | None = None  # (T, B) rows with the same latent and prompt; None: every row its own
    evaluations: int = 0  # latents that the model predicted

    @property
    def final(self) -> Tensor:
        """The clean latents, (B, C, H, W)."""
        return self.latents[-1]

    def drawn(self, i: int, rows: Tensor) -> Tensor:
        """Those of `rows` whose step i is stochastic and so can be trained, (rows,) -> (fewer,)."""
        return rows[self.drawn_mask(i)[rows]]

    def drawn_mask(self, i: int) -> Tensor:
        """Which images' step i is stochastic, -> (B,) bool."""
        if self.stochastic is None:
            return torch.full((self.latents.shape[1],), self.transitions[i].std > 0)
        return self.stochastic[i]

    def unique_rows(self, i: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows to predict at step i and where each of `rows` finds its output among them, (b,) -> (u,), (b,)."""
        if self.representatives is None:
            return rows, torch.arange(len(rows))
        unique, places = self.representatives[i, rows].unique(return_inverse=True)
        return unique, places


def derive_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers, so that any group of any update can be drawn alone."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


class GroupNoise:
    """Noise of whole groups, each from its own generator: a group's images do not depend on the other groups.

    Noise is drawn on the CPU, so a seed gives the same image on every device.
    """

    def __init__(self, seeds: Sequence[int], group_size: int, shape: Sequence[int], shared_first: bool = False):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.group_size, self.shape, self.shared_first = group_size, tuple(shape), shared_first

    @property
    def count(self) -> int:
        """The number of images, P * G."""
        return len(self.generators) * self.group_size

    def first(self) -> Tensor:
        """The first latents, -> (P * G, C, H, W); one per group, repeated, if `shared_first`."""
        if not self.shared_first:
            return self.next()
        return self.next_shared()

    def next_shared(self) -> Tensor:
        """Noise of one level, the same for all images of a group, -> (P * G, C, H, W)."""
        draws = [torch.randn(1, *self.shape, generator=g).expand(self.group_size, *self.shape) for g in self.generators]
        return torch.cat(draws)

    def next(self) -> Tensor:
        """Noise of one step, -> (P * G, C, H, W)."""
        return torch.cat([torch.randn(self.group_size, *self.shape, generator=g) for g in self.generators])


def check_chunks(noise: GroupNoise, chunks: Sequence[Tensor]) -> None:
    """Raise ValueError unless the chunks' rows are those of the noise, each once."""
    rows, count = torch.cat([torch.empty(0, dtype=torch.long), *chunks]).sort().values, noise.count
    if not torch.equal(rows, torch.arange(count)):
        raise ValueError(
            f"chunks hold {len(rows)} rows, {len(rows.unique())} of them different, but the noise has {count}. "
            "Cover each of its rows once."
        )


def predict_rows(predict: Predict, x: Tensor, t: float, chunks: Sequence[Tensor]) -> Tensor:
    """Outputs for the rows of all chunks, (B, C, H, W) -> (B, C, H, W) float32 on the CPU.

    A GPU is waited for only once, after the last chunk.
    """
    outs = torch.cat([predict(x[rows], t, rows).float() for rows in chunks]).cpu()
    result = torch.zeros_like(x)
    result[torch.cat(list(chunks))] = outs
    return result


@torch.no_grad()
def rollout(
    predict: Predict, grid: Grid, transitions: Sequence[Transition], noise: GroupNoise, chunks: Sequence[Tensor]
) -> Trajectory:
    """Sample every image of `noise`, one model call per step and chunk of rows, -> Trajectory.

    The update calls the model with the same chunks, so that an unchanged model repeats its outputs to the bit.
    """
    check_chunks(noise, chunks)
    x = noise.first()
    count, steps = len(x), len(transitions)
    latents, noises, outs = (x.new_empty((n, *x.shape)) for n in (steps + 1, steps, steps))
    latents[0] = x
    for i, (transition, t) in enumerate(zip(transitions, grid.timesteps.tolist(), strict=True)):
        noises[i] = noise.next()
        outs[i] = predict_rows(predict, latents[i], t, chunks)
        latents[i + 1] = step(latents[i], outs[i], noises[i], transition)
    return Trajectory(latents, noises, outs, transitions, grid.timesteps.tolist(), evaluations=steps * count)


@torch.no_grad()
def rollout_chunks(
    predict: Predict, grid: Grid, transitions: Sequence[Transition], noise: GroupNoise, chunks: Sequence[Tensor]
) -> Iterator[tuple[Trajectory, Tensor]]:
    """`rollout` to the bit, but chunk after chunk: the trajectory so far and the rows just sampled."""
    check_chunks(noise, chunks)
    x = noise.first()
    latents, noises, outs = (x.new_zeros((n, *x.shape)) for n in (len(transitions) + 1, *[len(transitions)] * 2))
    latents[0] = x
    for i in range(len(transitions)):
        noises[i] = noise.next()
    path = Trajectory(latents, noises, outs, transitions, grid.timesteps.tolist())
    for rows in chunks:
        for i, (transition, t) in enumerate(zip(transitions, path.timesteps, strict=True)):
            outs[i, rows] = predict(latents[i, rows], t, rows).float().cpu()
            latents[i + 1, rows] = step(latents[i, rows], outs[i, rows], noises[i, rows], transition)
        path.evaluations += len(transitions) * len(rows)
        yield path, rows
