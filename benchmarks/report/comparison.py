"""Two methods compared over tasks and seeds, and all comparisons of a page corrected together."""

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..study.mixed_model import MixedModel, Observation, fit_mixed_model
from ..study.outcome import GOAL
from ..study.statistics import Interval, clustered_bootstrap, holm, median, t_interval, t_test
from .collect import CellRun, RunMeasure, StudyResults, run_gain

_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True)
class PairedDifference:
    """Differences between two methods: one per seed, the mean over the tasks that can be compared."""

    differences: list[float]
    wins: int  # pairs of seed and task with a larger value of the first method
    pairs: int

    @property
    def interval(self) -> Interval:
        return t_interval(self.differences)

    @property
    def better_in(self) -> str:
        return f"{self.wins}/{self.pairs}" if self.pairs else "-"


def pairs(results: StudyResults, first: str, second: str) -> list[tuple[CellRun, CellRun]]:
    """Runs of two methods paired by seed, in the tasks that they and the whole first wave have finished."""
    return [
        (mine, other)
        for task in results.comparable(first, second)
        for mine, other in zip(task.runs[first], task.runs[second], strict=True)
    ]


def paired_difference(results: StudyResults, first: str, second: str, of: RunMeasure = run_gain) -> PairedDifference:
    """Both run a seed with the same prompts and noise; seeds are the independent draws, tasks are not."""
    by_seed: dict[int, list[float]] = {}
    for mine, other in pairs(results, first, second):
        by_seed.setdefault(mine.seed, []).append(of(mine) - of(other))
    every = [difference for own in by_seed.values() for difference in own]
    return PairedDifference(
        [sum(own) / len(own) for _, own in sorted(by_seed.items())], sum(d > 0 for d in every), len(every)
    )


def corrected_p_values(differences: Iterable[tuple[_Key, Sequence[float]]]) -> dict[_Key, float]:
    """p-values of zero means by Student's t, corrected by Holm's method as one family."""
    named = list(differences)
    return dict(zip([key for key, _ in named], holm([t_test(values) for _, values in named]), strict=True))


def mixed_model(results: StudyResults, reference: str) -> MixedModel:
    """Gains of all finished runs."""
    rows = [
        Observation(run.method, run.task.name, run.seed, run.gain)
        for task in results.tasks
        for runs in task.runs.values()
        for run in runs
    ]
    return fit_mixed_model(rows, reference)


def times_cheaper(results: StudyResults, name: str, reference: str, goal: float = GOAL) -> str:
    """How many times the model evaluations to a gain the reference needs, the median over pairs of seed and task.

    Pairs in which neither reaches it are left out. A reference that never does counts with all it has spent, so the
    ratio depends on how long its runs are; a method that never does counts as 0.
    """
    by_seed: dict[int, list[float]] = {}
    for mine, other in pairs(results, name, reference):
        own, others = mine.price(goal), other.price(goal)
        if min(own, others) < math.inf:
            by_seed.setdefault(mine.seed, []).append(min(others, other.rows[-1]["model_evaluations"]) / own)
    if not by_seed:
        return "-"
    middle = clustered_bootstrap(list(by_seed.values()), median)
    limits = "" if math.isnan(middle.low) else f" [{middle.low:.1f}, {middle.high:.1f}]"
    return f"{middle.value:.1f} x{limits}, {sum(map(len, by_seed.values()))} pairs"
