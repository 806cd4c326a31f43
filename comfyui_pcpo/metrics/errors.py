"""The error that the metrics raise."""

from collections.abc import Iterator
from contextlib import contextmanager

from comfyui_pcpo.reward.base import RewardError


class MetricError(ValueError):
    """A metric that cannot be computed: its network, its weights or its inputs do not fit."""


@contextmanager
def weight_errors() -> Iterator[None]:
    """The readers of weight files are shared with the rewards; here, what they refuse is a MetricError."""
    try:
        yield
    except RewardError as error:
        raise MetricError(str(error)) from error
