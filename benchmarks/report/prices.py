"""One price for all methods of a task: what its cheapest run spends in all."""

from ..study.outcome import Price
from .collect import StudyResults, TaskResults

UNITS: dict[Price, str] = {"model_evaluations": "model evaluations", "images": "images", "cpu_seconds": "CPU seconds"}


def cheapest_run(results: StudyResults, task: TaskResults, of: Price = "model_evaluations") -> float:
    """What the task's cheapest run of the first wave spends, or of all methods before the first wave has a run."""
    first = [run for name in results.study.methods for run in task.runs.get(name, ())]
    spent = [run.rows[-1][of] for run in first or [run for runs in task.runs.values() for run in runs]]
    return min((price for price in spent if price > 0), default=0.0)  # 0: it overflowed before its first evaluation
