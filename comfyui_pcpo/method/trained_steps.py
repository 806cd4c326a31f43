"""Which steps an update trains: all, a random share, the first k, all but the last k; and one level per stratum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class StepSelection:
    """Which of the trainable steps an update trains; the defaults train all of them."""

    share: float = 1.0  # random share of the steps left by the other two (DanceGRPO: 0.6)
    first: int = 0  # only the first k; 0: no limit
    skip_last: int = 0  # not the last k

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or self.first < 0 or self.skip_last < 0:
            raise ValueError(
                f"share is {self.share}, first {self.first} and skip_last {self.skip_last}, but the share is in (0, 1] "
                "and the others are 0 or more. Use share 1, first 0 and skip_last 0 to train every step."
            )

    def of_run(self, trainable: Sequence[int]) -> list[int]:
        """The steps that some update of the run may train: those over which zeta is taken."""
        steps = sorted(trainable)[: max(0, len(trainable) - self.skip_last)]
        steps = steps[: self.first] if self.first else steps
        if not steps:
            raise ValueError(
                f"{len(trainable)} steps can be trained and skip_last is {self.skip_last}, which leaves none. "
                "Lower skip_last or use more steps."
            )
        return steps


def choose_steps(rng: np.random.Generator, trainable: Sequence[int], selection: StepSelection) -> list[int]:
    """The steps that one update trains, rising. A random share is drawn without replacement, at least one step."""
    steps = selection.of_run(trainable)
    count = max(1, round(len(steps) * selection.share))
    return sorted(rng.choice(steps, count, replace=False).tolist())


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
