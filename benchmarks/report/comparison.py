"""Methods compared with a reference method over all tasks."""

import math
from collections.abc import Sequence

from ..study.methods import BASELINE, OURS, STUDY_METHODS
from ..study.mixed_model import MixedModel, fit_mixed_model
from ..study.statistics import bootstrap, holm, median, t_interval, t_test
from .collect import GOALS, TaskResults, by_seed, paired_runs
from .markdown import format_interval, format_p_value, markdown_table

REFERENCES = (BASELINE, OURS)


def corrected_p_values(results: Sequence[TaskResults]) -> dict[tuple[str, str], float]:
    """p-value by seeds of every method against native PPO and against PCPO, all in one Holm family."""
    names = [name for name in STUDY_METHODS if any(name in task.runs for task in results)]
    pairs = [(name, BASELINE) for name in names if name != BASELINE]
    pairs += [(name, OURS) for name in names if name not in REFERENCES]
    corrected = holm([t_test(by_seed(results, *pair)) for pair in pairs])
    p_values = dict(zip(pairs, corrected, strict=True))
    return p_values | {(second, first): p for (first, second), p in p_values.items()}


def comparison_table(results: Sequence[TaskResults], reference: str) -> tuple[str, MixedModel]:
    """Every method against the reference over all tasks: by the mixed model, and by seeds averaged over the tasks."""
    model = fit_mixed_model([row for task in results for row in task.rows()], reference)
    p, lines = corrected_p_values(results), []
    for name in (name for name in STUDY_METHODS if name in model.effects):
        by_model = [format_interval(model.effects[name]), format_p_value(model.p[name])]
        by_seeds = [format_interval(t_interval(by_seed(results, name, reference))), format_p_value(p[name, reference])]
        counts = [wins(results, name, reference), updates_saved(results, name, reference)]
        final = format_interval(t_interval(by_seed(results, name, reference, lambda run: run.gains[-1])))
        lines.append([STUDY_METHODS[name].title, *by_model, *by_seeds, *counts, final])
    head = [f"against {STUDY_METHODS[reference].title}", "difference (mixed model)", "p", "difference (by seeds)"]
    head += ["p (Holm)", "better in", f"updates saved to +{GOALS[0]:g}", "final gain, all images"]
    return markdown_table(head, lines), model


def wins(results: Sequence[TaskResults], name: str, reference: str) -> str:
    """In how many pairs of seed and task the method has the larger mean kept gain, out of how many."""
    differences = [mine.mean_kept_gain - other.mean_kept_gain for mine, other in paired_runs(results, name, reference)]
    return f"{sum(difference > 0 for difference in differences)}/{len(differences)}"


def updates_saved(results: Sequence[TaskResults], name: str, reference: str) -> str:
    """Median share of updates saved up to the first goal, over the pairs in which at least one run reaches it.

    A reference that never reaches it counts with all its updates, which underestimates the saving.
    """
    saved = []
    for mine, other in paired_runs(results, name, reference):
        own, others = mine.reach(GOALS[0]), other.reach(GOALS[0])
        if min(own, others) < math.inf:
            saved.append(1 - own / min(others, other.updates[-1]))
    middle = bootstrap(saved, median)
    low, value, high = (
        f"{round(100 * v)} %" if math.isfinite(v) else "never" for v in (middle.low, middle.value, middle.high)
    )
    return f"{value} [{low}, {high}] of {len(saved)}" if len(saved) > 1 else "-"
