"""The page on proportionality: the same objective under every credit, with and without branching."""

import math
from pathlib import Path

import numpy as np
from PIL import Image

from ..markdown import format_interval, format_number, format_p_value, markdown_table
from ..study.methods import CREDIT_METHODS, STUDY_METHODS
from ..study.recipes import RECIPES
from ..study.statistics import t_interval
from .collect import StudyResults, TaskResults, by_step
from .comparison import PairedDifference, corrected_p_values, paired_difference
from .progress_figure import ProgressLine, ProgressPanel, progress_figure

CREDIT_INTRO = """The log-hinge objective under every credit of the denoising steps, without and with branches.
Tasks, seeds and rollouts are the same, the learning rate is tuned for each credit; "first 40 % of the steps" and "one
step less" also train fewer steps. Compared is the gain within the limits of diversity and distance, by seeds, with
the same rollouts. Credit in proportion to time has to beat native credit, and also uniform credit and one step less,
which are simpler: these comparisons are one family for Holm's method, all others have no p-values. On ddim the grid
is even in time, so proportionate credit is uniform there, and the two are only compared on flow models. With a branch
of 1 each group trains a single step, so credit only weighs the groups of an update against each other: weaker
evidence on credit than the runs without branches."""
HEALTH = """Gradient norm per step, means over updates and seeds: the largest over the smallest of the trained steps.
Clip fraction: per step, from the least to the most clipped one."""
PROPORTIONATE = "proportionate"
RIVALS = ("native", "uniform", "early")  # credits that the proportionate one has to beat
BRANCHED = "-branch-1"  # how the names of methods with branching end


def credit_comparisons(results: StudyResults) -> dict[tuple[str, str], tuple[PairedDifference, float]]:
    """(method, rival) -> comparison over all tasks that have both, and its p-value; NaN outside of the family.

    The family is that of proportionate credit with its rivals, the others are compared with native credit.
    """
    compared = {}
    for end in ("", BRANCHED):
        pairs = [(PROPORTIONATE, rival) for rival in RIVALS]
        pairs += [(name, "native") for name in CREDIT_METHODS if name not in (PROPORTIONATE, "native")]
        for first, second in ((one + end, other + end) for one, other in pairs):
            if first in results.methods and second in results.methods:
                compared[first, second] = paired_difference(results, first, second)
    family = {key: one.differences for key, one in compared.items() if key[0].startswith(PROPORTIONATE)}
    p = corrected_p_values(family)
    return {key: (one, p.get(key, math.nan)) for key, one in compared.items()}


def proportionality_page(results: StudyResults, images: Path, where: str) -> str:
    """The page as Markdown; its figure is saved in `images`, which the page refers to as `where`."""
    credit_figure(results).save(images / f"{results.name}.png")
    figure = f"![Reward gained per model evaluation, by credit]({where}/{results.name}.png)"
    parts = ["# Is proportionality what helps?", CREDIT_INTRO, figure, "## Over all tasks"]
    parts.append(overall_table(results))
    for task in results.measured:
        parts += [f"## {task.task.title}", task_table(task), health_table(task)]
    return "\n\n".join([*parts, HEALTH])


def credit_figure(results: StudyResults) -> Image.Image:
    """For each task a panel without branches and one with, of the credits whose every seed is finished."""
    panels = []
    for task in results.measured:
        for end, rollouts in (("", "no branches"), (BRANCHED, "branch of 1")):
            shown = [name for name in CREDIT_METHODS if results.has_every_seed(task, name + end)]
            if shown:
                lines = [ProgressLine(name + end, CREDIT_METHODS[name].title) for name in shown]
                recipe = RECIPES[task.task.recipe]
                title = f"{recipe.model}, {recipe.sampler}, {rollouts}"
                panels.append(ProgressPanel(title, task, lines))
    return progress_figure(panels, "Which credit gains more? Up and to the left is better")


def overall_table(results: StudyResults) -> str:
    """Every comparison, over the tasks that both methods have finished."""
    rows = []
    for (name, rival), (one, p) in credit_comparisons(results).items():
        compared = [format_interval(one.interval), format_p_value(p), one.better_in]
        tasks = str(len(results.comparable(name, rival)))
        rows.append([STUDY_METHODS[name].title, STUDY_METHODS[rival].title, *compared, tasks])
    return markdown_table(["credit", "against", "difference", "p (Holm)", "better in", "tasks"], rows)


def task_table(task: TaskResults) -> str:
    """Gain and price by method."""
    rows = []
    for name in task.measured:
        runs = task.runs[name]
        gain = format_interval(t_interval([run.gain for run in runs]))
        price = format_number(float(np.mean([run.rows[-1]["model_evaluations"] for run in runs])), 0)
        rows.append([STUDY_METHODS[name].title, task.chosen[name].title, str(len(runs)), gain, price])
    head = ["credit", "learning rate, KL weight", "seeds", "gain within the limits"]
    return markdown_table([*head, "model evaluations of a run"], rows)


def health_table(task: TaskResults) -> str:
    """How even the steps are under each credit."""
    rows = []
    for name in task.measured:
        (_, norm), (_, clip) = (by_step(task.runs[name], key) for key in ("grad_norm", "clip_fraction"))
        cells = ["-", "-"]  # all of its runs overflowed in their first update
        if len(norm):
            ratio = f"{np.nanmax(norm) / np.nanmin(norm):.1f}"
            cells = [ratio, f"{100 * np.nanmin(clip):.1f} to {100 * np.nanmax(clip):.1f}"]
        rows.append([STUDY_METHODS[name].title, *cells])
    return markdown_table(["", "gradient norm, largest / smallest step", "clip fraction per step, %"], rows)
