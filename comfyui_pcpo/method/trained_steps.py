"""Which steps an update trains: all, a random share, the first k, all but the last k; and one level per stratum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class StepSelection:
    """Which steps a run may train, the steps that zeta is computed over; the defaults leave none out."""

    first: int = 0  # only the first k trainable ones; 0: no limit
    skip_last: int = 0  # not the last k of the grid

    def __post_init__(self) -> None:
        if self.first < 0 or self.skip_last < 0:
            raise ValueError(f"first is {self.first} and skip_last {self.skip_last}, but both are 0 or more.")

    def of_run(self, trainable: Sequence[int], steps: int) -> list[int]:
        """The trainable steps that updates may train, of a grid of `steps` steps."""
        able = [i for i in sorted(trainable) if i < steps - self.skip_last]
        able = able[: self.first] if self.first else able
        if not able:
            raise ValueError(
                f"none of the {steps} steps can be trained ({len(trainable)} have noise, the last {self.skip_last} are "
                "left out). Use a noise_level above 0 and more steps."
            )
        return able


def choose_steps(rng: np.random.Generator, able: Sequence[int], share: float = 1.0) -> list[int]:
    """The steps that one update trains, rising: a random share of those of the run, at least one (DanceGRPO: 0.6)."""
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}, but must be above 0 and at most 1. 1 trains every step.")
    count = max(1, round(len(able) * share))
    return sorted(rng.choice(able, count, replace=False).tolist())


@dataclass(frozen=True)
class Levels:
    """Steps whose noise levels an update uses, and the weights that make their mean unbiased for that of all steps."""

    steps: list[int]
    weights: list[float]


def stratified_levels(rng: np.random.Generator, trainable: Sequence[int], count: int) -> Levels:
    """`count` levels, one drawn from each of as many strata of neighbouring steps, -> Levels.

    V-GRPO (arXiv 2604.23380), stratified timesteps.  mean_j n_j count / n f(i_j),  i_j uniform in stratum j of n_j
    steps, has the expectation mean_i f(i) over all n steps; the weights are 1 where strata have equal sizes.
    """
    if not 1 <= count <= len(trainable):
        raise ValueError(f"count is {count}, but {len(trainable)} levels have 1 to {len(trainable)} strata.")
    strata = np.array_split(np.asarray(sorted(trainable)), count)
    return Levels(
        [int(rng.choice(stratum)) for stratum in strata],
        [len(stratum) * count / len(trainable) for stratum in strata],
    )
