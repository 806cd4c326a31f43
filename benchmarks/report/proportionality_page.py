"""The page on proportionality: the same objective under every credit, with and without branching."""

import numpy as np

from ..study.methods import STUDY_METHODS
from ..study.statistics import t_interval
from .collect import StudyResults, TaskResults, by_step
from .comparison import PairedDifference, corrected_p_values, paired_difference
from .markdown import format_interval, format_p_value, markdown_table

CREDIT_INTRO = """The log-hinge objective under every credit of the denoising steps, with and without branching;
everything else is equal. Compared is the gain within the limits of diversity and distance, by seeds, against native
credit with the same rollouts. p-values are corrected by Holm's method over the page. On ddim the grid is even in
time, so credit in proportion to time is the uniform one, which is therefore only run on flow models."""
HEALTH = """Gradient norm per step: the largest over the smallest of the trained steps, means over updates and seeds;
clip fraction: per step, from the least to the most clipped one."""
BRANCHED = "-branch-1"  # how the names of methods with branching end


def native_of(name: str, baseline: str) -> str:
    """The method with native credit and the same rollouts."""
    return baseline + BRANCHED if name.endswith(BRANCHED) else baseline


def credit_comparisons(results: StudyResults) -> dict[tuple[str, str], tuple[PairedDifference, float]]:
    """(task, method) -> comparison with native credit and its corrected p-value; the task "" is all of them."""
    baseline = results.study.baseline
    one_task = {
        task.task.name: StudyResults(results.name, results.study, results.out, [task]) for task in results.tasks
    }
    compared = {
        (task, name): paired_difference(some, name, native_of(name, baseline))
        for task, some in {"": results, **one_task}.items()
        for name in results.methods
        if name != native_of(name, baseline)
    }
    p = corrected_p_values((key, one.differences) for key, one in compared.items())
    return {key: (one, p[key]) for key, one in compared.items()}


def proportionality_page(results: StudyResults) -> str:
    family = credit_comparisons(results)
    parts = ["# Is proportionality what helps?", CREDIT_INTRO, "## Over all tasks", overall_table(results, family)]
    for task in results.measured:
        parts += [f"## {task.task.title}", task_table(task, family), health_table(task)]
    return "\n\n".join([*parts, HEALTH])


def overall_table(results: StudyResults, family: dict[tuple[str, str], tuple[PairedDifference, float]]) -> str:
    """Every credit against the native one, over the tasks in which both are finished."""
    rows = []
    for name in (name for name in results.methods if ("", name) in family):
        one, p = family["", name]
        rows.append([STUDY_METHODS[name].title, format_interval(one.interval), format_p_value(p), one.better_in])
    return markdown_table(["against native credit", "difference (by seeds)", "p (Holm)", "better in"], rows)


def task_table(task: TaskResults, family: dict[tuple[str, str], tuple[PairedDifference, float]]) -> str:
    rows = []
    for name in task.measured:
        runs, compared = task.runs[name], ["-", "-"]
        if (task.task.name, name) in family:
            one, p = family[task.task.name, name]
            compared = [format_interval(one.interval), format_p_value(p)]
        gain = format_interval(t_interval([run.gain for run in runs]))
        price = format_interval(t_interval([run.rows[-1]["model_evaluations"] for run in runs]), 0)
        title, setting = STUDY_METHODS[name].title, task.chosen[name].title
        rows.append([title, setting, str(len(runs)), gain, *compared, price])
    head = [
        "credit",
        "learning rate, KL weight",
        "seeds",
        "gain within the limits",
        "more than native",
        "p (Holm)",
    ]
    return markdown_table([*head, "model evaluations of a run"], rows)


def health_table(task: TaskResults) -> str:
    """How even the steps are under each credit."""
    rows = []
    for name in task.measured:
        (_, norm), (_, clip) = (by_step(task.runs[name], key) for key in ("grad_norm", "clip_fraction"))
        ratio = f"{np.nanmax(norm) / np.nanmin(norm):.1f}"
        rows.append([STUDY_METHODS[name].title, ratio, f"{100 * clip.min():.1f} to {100 * clip.max():.1f}"])
    return markdown_table(["", "gradient norm, largest / smallest step", "clip fraction per step, %"], rows)
