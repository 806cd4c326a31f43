"""A run under the guard: what it measures, when it would have stopped the run, and which update it keeps."""

from collections.abc import Sequence
from typing import Any

from trainer.config.guard_section import GuardConfig
from trainer.guard.limits import GuardVerdict, next_verdict


def guard_outcome(records: Sequence[dict[str, Any]], guard: GuardConfig) -> dict[str, Any]:
    """The update that the guard keeps, and that at which it stops the run; None for none.

    Until it stops the run, a guard only measures. So one run that goes on shows both outcomes.
    """
    verdict, evaluations = GuardVerdict(), 0
    for record in (record for record in records if "guard" in record):
        verdict = next_verdict(verdict, record["guard"], record["update"], guard)
        evaluations += record["guard"]["model_evaluations"]
        if verdict.violations >= guard.patience:
            return {"kept": verdict.kept, "stopped": record["update"], "model_evaluations": evaluations}
    return {"kept": verdict.kept, "stopped": None, "model_evaluations": evaluations}
