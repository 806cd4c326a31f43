"""The page on proportionality: the same objective under every credit, with and without branching."""

from pathlib import Path

import numpy as np
from PIL import Image

from ..study.methods import CREDIT_METHODS, STUDY_METHODS
from ..study.recipes import RECIPES
from ..study.statistics import t_interval
from .collect import StudyResults, TaskResults, by_step
from .comparison import PairedDifference, corrected_p_values, paired_difference
from .frontier_figure import ProgressLine, ProgressPanel, progress_figure
from .markdown import format_interval, format_p_value, markdown_table

CREDIT_INTRO = """The log-hinge objective under every credit of the denoising steps, with and without branching. Tasks,
seeds and rollouts are the same, the learning rate is tuned for each credit; "first 40 % of the steps" and "one step
less" also train fewer steps. Compared is the gain within the limits of diversity and distance, by seeds, against native
credit with the same rollouts. p-values are corrected by Holm's method in two families: proportionate credit over all
tasks, with and without branches, and everything else. On ddim the grid is even in time, so credit in proportion to time
is the uniform one, which is therefore only run on flow models."""
HEALTH = """Gradient norm per step, means over updates and seeds: the largest over the smallest of the trained steps.
Clip fraction: per step, from the least to the most clipped one."""
PROPORTIONATE = "proportionate"
BRANCHED = "-branch-1"  # how the names of methods with branching end

Comparisons = dict[tuple[str, str], tuple[PairedDifference, float]]


def native_of(name: str, baseline: str) -> str:
    """The method with native credit and the same rollouts."""
    return baseline + BRANCHED if name.endswith(BRANCHED) else baseline


def credit_comparisons(results: StudyResults) -> Comparisons:
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
    first = [key for key in compared if key in (("", PROPORTIONATE), ("", PROPORTIONATE + BRANCHED))]
    p: dict[tuple[str, str], float] = {}
    for family in (first, [key for key in compared if key not in first]):
        p |= corrected_p_values((key, compared[key].differences) for key in family)
    return {key: (one, p[key]) for key, one in compared.items()}


def proportionality_page(results: StudyResults, images: Path, where: str) -> str:
    """The page as Markdown; its figure is saved in `images`, which the page refers to as `where`."""
    credit_figure(results).save(images / f"{results.name}.png")
    family = credit_comparisons(results)
    figure = f"![Reward gained per model evaluation, by credit]({where}/{results.name}.png)"
    parts = ["# Is proportionality what helps?", CREDIT_INTRO, figure, "## Over all tasks"]
    parts.append(overall_table(results, family))
    for task in results.measured:
        parts += [f"## {task.task.title}", task_table(task, family), health_table(task)]
    return "\n\n".join([*parts, HEALTH])


def credit_figure(results: StudyResults) -> Image.Image:
    """For each task a panel with branches and one without, as far as they have finished runs."""
    panels = []
    for task in results.measured:
        for end, rollouts in ((BRANCHED, "branch of 1"), ("", "no branches")):
            if any(task.runs.get(name + end) for name in CREDIT_METHODS):
                lines = [ProgressLine(name + end, method.title) for name, method in CREDIT_METHODS.items()]
                recipe = RECIPES[task.task.recipe]
                panels.append(ProgressPanel(f"{recipe.model}, {recipe.sampler}, {rollouts}", task, lines))
    return progress_figure(panels)


def overall_table(results: StudyResults, family: Comparisons) -> str:
    """Every credit against the native one, over the tasks that can be compared."""
    rows = []
    for name in (name for name in results.methods if ("", name) in family):
        one, p = family["", name]
        tasks = len(results.comparable(name, native_of(name, results.study.baseline)))
        compared = [format_interval(one.interval), format_p_value(p), one.better_in, str(tasks)]
        rows.append([STUDY_METHODS[name].title, *compared])
    return markdown_table(["against native credit", "difference (by seeds)", "p (Holm)", "better in", "tasks"], rows)


def task_table(task: TaskResults, family: Comparisons) -> str:
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
    head = ["credit", "learning rate, KL weight", "seeds", "gain within the limits", "more than native", "p (Holm)"]
    return markdown_table([*head, "model evaluations of a run"], rows)


def health_table(task: TaskResults) -> str:
    """How even the steps are under each credit."""
    rows = []
    for name in task.measured:
        (_, norm), (_, clip) = (by_step(task.runs[name], key) for key in ("grad_norm", "clip_fraction"))
        ratio = f"{np.nanmax(norm) / np.nanmin(norm):.1f}"
        rows.append([STUDY_METHODS[name].title, ratio, f"{100 * clip.min():.1f} to {100 * clip.max():.1f}"])
    return markdown_table(["", "gradient norm, largest / smallest step", "clip fraction per step, %"], rows)
