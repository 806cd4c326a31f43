"""What is reported of a run: pure functions of its evaluations, one row each, the first before any update.

A gain only counts while the images are still varied and near the base model's: a reward can also be raised by making
all images alike, which costs diversity, or by destroying them, which costs distance and may even add diversity.
"""

from collections.abc import Sequence
from math import inf, isfinite
from typing import Any, Literal, NamedTuple

import numpy as np

from .statistics import first_reach

Row = dict[str, Any]
EvaluationRows = Sequence[Row]
Price = Literal["model_evaluations", "images", "cpu_seconds"]


class Limits(NamedTuple):
    """What ends the comparison of a run."""

    lost_diversity: float  # share of the base model's
    far: float  # distance, as a multiple of what the base model's own images have

    @property
    def lost_share(self) -> str:
        """The lost diversity in words."""
        return f"{100 * self.lost_diversity:g} %"


LIMITS = Limits(0.1, 1.5)
OTHER_LIMITS = (Limits(0.05, 1.25), Limits(0.2, 2.0))  # that the results are also reported for
GOALS = (0.1, 0.25, 0.5)  # gains whose price is reported; fixed before the reported runs
GOAL = 0.25  # the one whose images and CPU seconds are reported too


def gain(row: Row, before: Row, reward: str) -> float:
    """Increase of a reward between two evaluations, in standard deviations over the images of the first.

    Where those all score alike, as of a reward that counts right images and finds only such, the deviation of the
    second evaluation takes its place; where it is 0 too, the increase itself counts.
    """
    deviation = before[f"{reward}_std"] or row[f"{reward}_std"] or 1.0
    return (row[reward] - before[reward]) / deviation


def gains(rows: EvaluationRows, reward: str) -> list[float]:
    return [gain(row, rows[0], reward) for row in rows]


def lost_diversity(rows: EvaluationRows) -> list[float]:
    """Share of the base model's diversity that is lost."""
    return [1 - row["diversity"] / rows[0]["diversity"] for row in rows]


def distance(rows: EvaluationRows) -> list[float]:
    """Distance to the base model, in multiples of the distance of the base model's own images."""
    return [row["fd_base"] / rows[0]["fd_base"] for row in rows]


def at_lost_diversity(rows: EvaluationRows, values: Sequence[float], lost: float = LIMITS.lost_diversity) -> float:
    """A curve where diversity has fallen by `lost`, between evaluations on a straight line; its end if it never has."""
    return _at(_place(lost_diversity(rows), lost), values)


def at_distance(rows: EvaluationRows, values: Sequence[float], far: float = LIMITS.far) -> float:
    """A curve where the distance reaches `far`; its end if it never does."""
    return _at(_place(distance(rows), far), values)


def at_limits(rows: EvaluationRows, values: Sequence[float]) -> float:
    """A curve where the first of both limits is reached; its end if neither is."""
    return _at(_limit(rows), values)


def gains_within_limits(rows: EvaluationRows, reward: str) -> list[float]:
    """The gain by evaluation; from where the first limit is reached on, the gain there, as with early stopping."""
    own, limit = gains(rows, reward), _limit(rows)
    return [_at(min(place, limit), own) for place in range(len(rows))]


def gain_within_limits(rows: EvaluationRows, reward: str, limits: Limits = LIMITS) -> float:
    """The number that settings are chosen by and methods are compared in."""
    return _at(_limit(rows, limits), gains(rows, reward))


def gain_at_price(rows: EvaluationRows, reward: str, spent: float, of: Price = "model_evaluations") -> float:
    """The gain within the limits once that much is spent, on straight lines between the run's evaluations."""
    place = np.interp(spent, [row[of] for row in rows], range(len(rows)))
    return _at(min(place, _limit(rows)), gains(rows, reward))


def price(rows: EvaluationRows, reward: str, goal: float, of: Price) -> float:
    """What is spent until the gain reaches `goal`; infinity if it has not before the first limit is reached."""
    reached = _place(gains(rows, reward), goal)
    if reached > _limit(rows) or reached == inf:
        return inf
    return _at(reached, [row[of] for row in rows])


def _limit(rows: EvaluationRows, limits: Limits = LIMITS) -> float:
    """The place between evaluations where diversity or distance reaches its limit; infinity if neither does."""
    return min(_place(lost_diversity(rows), limits.lost_diversity), _place(distance(rows), limits.far))


def _place(curve: Sequence[float], level: float) -> float:
    return first_reach(range(len(curve)), curve, level)


def _at(place: float, values: Sequence[float]) -> float:
    """A curve at a place between evaluations; of a run that diverged, at most at its last one before that."""
    known = [value for value in values if isfinite(value)]
    return float(np.interp(place, range(len(known)), known))


def tinyeval_curve(rows: EvaluationRows, task: str = "hard tasks") -> list[float]:
    """Share of right images of one of TinyEval's tasks, or of all hard ones, on prompts that are never trained."""
    return [row["tinyeval_shares"][task] for row in rows]
