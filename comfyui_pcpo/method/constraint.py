"""Maximise one reward subject to another not falling below its start: a weight that grows while it is violated."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the configuration is read without torch
    from torch import Tensor


@dataclass
class Constraint:
    """The Lagrange multiplier of "the mean of a reward stays at or above its floor", by projected dual ascent.

    floor b and unit s: mean and population std of the reward in the first update, whose images the unchanged model
    made; if its scores are all equal, s is the std in the first update whose scores are not, or the mean's first fall
    lambda_1 = 0,   lambda_(n + 1) = min(max(lambda_n + rate (b - mean_n) / s, 0), limit)

    lambda_n is the reward's weight in update n, so a score never changes the weight that it is trained with.
    """

    rate: float = 0.2
    limit: float = 5.0
    weight: float = 0.0
    floor: float | None = None
    unit: float = 0.0

    def observe(self, scores: "Tensor") -> None:
        """Take in an update's scores, any shape; failed ones (NaN) do not count, nor does an update without others."""
        valid = scores[scores.isfinite()].double()
        if not valid.numel():
            return
        mean = float(valid.mean())
        if self.floor is None:
            self.floor, self.unit = mean, float(valid.std(correction=0))
        elif self.unit == 0:
            self.unit = float(valid.std(correction=0)) or max(self.floor - mean, 0.0)
        if self.unit > 0:
            self.weight = min(max(self.weight + self.rate * (self.floor - mean) / self.unit, 0.0), self.limit)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds; rate and limit are the configuration's."""
        return {"weight": self.weight, "floor": self.floor, "unit": self.unit}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weight, self.floor, self.unit = state["weight"], state["floor"], state["unit"]


def scheduled_weight(points: list[tuple[int, float]], number: int) -> float:
    """The weight in update `number`: linear between points (update, weight), constant outside them."""
    if number <= points[0][0]:
        return points[0][1]
    for (left, before), (right, after) in pairwise(points):
        if number <= right:
            return before + (after - before) * (number - left) / (right - left)
    return points[-1][1]
