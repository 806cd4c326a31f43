"""Two methods compared over tasks and seeds, and all comparisons of a page corrected together."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..study.mixed_model import MixedModel, Observation, fit_mixed_model
from ..study.statistics import Interval, holm, t_interval, t_test
from .collect import RunMeasure, StudyResults, TaskResults, run_gain

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


def paired_difference(
    results: StudyResults, first: str, second: str, of: RunMeasure = run_gain, reward: str | None = None
) -> PairedDifference:
    """Both run a seed with the same prompts and noise; seeds are the independent draws, tasks are not.

    Tasks are those that both and the whole first wave have finished, all of them or those of one reward.
    """
    tasks = results.comparable(first, second)
    return difference_within([task for task in tasks if reward in (None, task.task.reward)], first, second, of)


def difference_within(
    tasks: Sequence[TaskResults], first: str, second: str, of: RunMeasure = run_gain
) -> PairedDifference:
    """The same over these tasks, in which both are finished."""
    by_seed: dict[int, list[float]] = {}
    for task in tasks:
        for mine, other in zip(task.runs[first], task.runs[second], strict=True):
            by_seed.setdefault(mine.seed, []).append(of(mine) - of(other))
    every = [difference for own in by_seed.values() for difference in own]
    return PairedDifference(
        [sum(own) / len(own) for _, own in sorted(by_seed.items())], sum(d > 0 for d in every), len(every)
    )


def means_by_seed(results: StudyResults, name: str, reward: str, of: RunMeasure = run_gain) -> list[float]:
    """A measure of each seed, its mean over the comparable tasks of a reward; empty without any.

    A task counts once every seed is finished: otherwise the seeds would be means over different tasks.
    """
    tasks = [task for task in results.comparable(name) if task.task.reward == reward]
    return [sum(own) / len(own) for own in zip(*(map(of, task.runs[name]) for task in tasks), strict=True)]


def corrected_p_values(differences: Mapping[_Key, Sequence[float]]) -> dict[_Key, float]:
    """p-values of zero means by Student's t, corrected by Holm's method as one family."""
    return dict(zip(differences, holm([t_test(values) for values in differences.values()]), strict=True))


def mixed_model(results: StudyResults, reference: str) -> MixedModel:
    """Gains of all finished runs."""
    rows = [
        Observation(run.method, run.task.name, run.seed, run.gain)
        for task in results.tasks
        for runs in task.runs.values()
        for run in runs
    ]
    return fit_mixed_model(rows, reference)
