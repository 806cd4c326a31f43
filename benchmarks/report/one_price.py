"""One price for all methods of a task: what its cheapest run spends in all."""

from ..study.outcome import Price
from .collect import StudyResults, TaskResults

UNITS: dict[Price, str] = {"model_evaluations": "model evaluations", "images": "images", "cpu_seconds": "CPU seconds"}


def cheapest_run(results: StudyResults, task: TaskResults, of: Price = "model_evaluations") -> float:
    """What the task's cheapest run of the first wave spends, or of all methods before the first wave has a run.

    A run that overflowed has spent less than it would have, and is left out.
    """
    first = [run for name in results.study.methods for run in task.runs.get(name, ())]
    runs = first or [run for runs in task.runs.values() for run in runs]
    return min((run.rows[-1][of] for run in runs if not run.rows[-1].get("diverged")), default=0.0)
