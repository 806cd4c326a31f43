"""The table of results.md: one row per method, over the tasks that it and the whole first wave have finished."""

from ..markdown import format_interval, format_number, format_p_value, markdown_table
from ..study.methods import STUDY_METHODS
from .collect import StudyResults
from .frontier_page import frontier_family
from .one_price import UNITS, cheapest_run
from .prompts_page import mean_change


def summary_table(results: StudyResults) -> str:
    """Gains at the end and at one price, the comparison with native PPO, and TinyEval, of methods of every task."""
    family = frontier_family(results)
    cheapest = {(task.task, of): cheapest_run(results, task, of) for task in results.tasks for of in UNITS}
    rows = []
    for name in results.general:
        tasks, compared, gains = results.comparable(name), ["-"] * 2, ["-"] * (1 + len(UNITS))
        if (name, results.study.baseline) in family:
            one, p = family[name, results.study.baseline]
            compared = [format_interval(one.interval), format_p_value(p)]
        runs = [(task, run) for task in tasks for run in task.runs[name]]
        if runs:
            early = [[run.gain_at(cheapest[task.task, of], of) for task, run in runs] for of in UNITS]
            gains = [format_number(sum(own) / len(runs)) for own in ([run.gain for _, run in runs], *early)]
        count = f"{len(runs)} of {planned(results, name)}"
        rows.append([STUDY_METHODS[name].title, count, *gains, *compared, mean_change(results, name)])
    first, *others = UNITS.values()
    head = ["method", "runs", "gain within the limits", f"at one price: {first}", *others]
    return markdown_table([*head, "more than native PPO", "p (Holm)", "TinyEval, change"], rows)


def planned(results: StudyResults, name: str) -> int:
    """The number of a method's reported runs when the study is finished."""
    return len(results.study.seeds) * sum(name in task.runs for task in results.tasks)
