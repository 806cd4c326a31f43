"""The gain of a run in reward, counted only while the images keep their objects."""

from collections.abc import Sequence
from typing import Any

from .statistics import mean_height

KEEPS = 0.9  # share of the base model's correct objects that an evaluation needs for its gain to count


def gain(row: dict[str, Any], before: dict[str, Any], reward: str) -> float:
    """Increase of a reward between two evaluations, in standard deviations over the images of the first."""
    return (row[reward] - before[reward]) / before[f"{reward}_std"]


def kept_share(row: dict[str, Any], before: dict[str, Any]) -> float:
    """Share of images with the correct object, relative to the base model."""
    return row["object"] / before["object"]


def keeping(rows: Sequence[dict[str, Any]]) -> list[bool]:
    """Whether each evaluation keeps at least KEEPS of the correct objects of the first, the base model's."""
    return [kept_share(row, rows[0]) >= KEEPS for row in rows]


def kept_gains(result: dict[str, Any]) -> list[float]:
    """Gain of the latest evaluation that still kept its objects, (N,): the gain under early stopping.

    A reward such as colourfulness can be raised by destroying the image; such gains do not count.
    """
    kept = []
    for value, keeps in zip(result["gains"], keeping(result["rows"]), strict=True):
        kept.append(value if keeps else kept[-1])
    return kept


def mean_kept_gain(result: dict[str, Any]) -> float:
    """Mean kept gain over training, the number that settings are chosen by and methods are compared in.

    It rewards speed, as the paper does, and does not depend on a single evaluation.
    """
    return mean_height(result["updates"], kept_gains(result))
