"""A run under the guard: when it would have stopped the run, and which update it keeps."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from trainer.config.guard_section import GuardConfig
from trainer.guard.limits import GuardVerdict, next_verdict


class GuardOutcome(NamedTuple):
    """What a guard makes of a run."""

    kept: int | None  # update; None if no measurement is within the limits
    stopped: int | None  # update; None if it never stops the run
    model_evaluations: int  # of the guard's own, until it stops the run, the base model's included


def guard_outcome(records: Sequence[dict[str, Any]], guard: GuardConfig) -> GuardOutcome:
    """The outcome of a guard with these limits in a run that was measured as often and went on.

    Until it stops the run, a guard only measures. So one run shows the outcome of any limits, and of no guard.
    """
    verdict, measured = GuardVerdict(), [record for record in records if "guard" in record]
    evaluations = measured[0]["guard"]["model_evaluations"] if measured else 0  # of the base model's images
    for record in measured:
        verdict = next_verdict(verdict, record["guard"], record["update"], guard)
        evaluations += record["guard"]["model_evaluations"]
        if verdict.violations >= guard.patience:
            return GuardOutcome(verdict.kept, record["update"], evaluations)
    return GuardOutcome(verdict.kept, None, evaluations)
