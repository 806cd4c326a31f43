"""The page on who gains most at the same price."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..study.methods import OURS, STUDY_METHODS
from ..study.outcome import FAR, GOAL, GOALS, Price, at_distance, at_lost_diversity, distance, lost_diversity
from ..study.statistics import bootstrap, median, t_interval
from .collect import CellRun, StudyResults, TaskResults
from .comparison import PairedDifference, corrected_p_values, mixed_model, paired_difference, times_cheaper
from .frontier_figure import task_figure
from .markdown import format_interval, format_number, format_p_value, markdown_table
from .prompts_page import mean_change

FRONTIER_INTRO = f"""Every method has the setting that the tuning seeds chose for it ([tuning](tuning.md)). Compared
is the gain in reward within limits: at which diversity has fallen by 10 % or the tiny FD to the base model is
{FAR:g} times what new noise alone gives, whichever comes first, in standard deviations of the base model's rewards.
A run that reaches neither counts with its last gain."""
COMPARED = f"""\
"Difference (mixed model)": random intercepts for each seed of each task, REML, all finished runs. It takes the tasks of
a seed as independent, so its intervals are the narrower ones; its p-values are not corrected. "Difference (by seeds)":
the mean over the tasks in which both methods have finished every seed, Student's t over seeds; p-values of this column
are corrected by Holm's method over both tables. The family grows with every method that finishes, so they are final
only when all have. Both generalise to new seeds, not to other tasks. "Model evaluations saved": how many times the
model evaluations the reference needs to a gain of {GOAL:g}, median [95 %, bootstrap] over the pairs of seed and task in
which one of the two reaches it. A reference that does not reach it counts with all that its run spends, so the number
depends on how long the runs are, and rows with other pairs cannot be compared."""
PRICES = """\
Spent until the gain is reached, if it is reached within the limits: median over seeds [95 %, bootstrap], and how many
seeds reach it. Model evaluations are latents predicted once, in a rollout or in a gradient step, the KL's included;
between evaluations, and before the first one, a straight line is assumed. CPU seconds are of the process, of
rollouts, rewards and updates."""
UNITS: dict[Price, str] = {"model_evaluations": "model evaluations", "images": "images", "cpu_seconds": "CPU seconds"}


def frontier_page(results: StudyResults, images: Path, where: str) -> str:
    """The page as Markdown; its figure is saved in `images`, which the page refers to as `where`."""
    task_figure(results).save(images / f"{results.name}-tasks.png")
    tables = [f"## {task.task.title}\n\n{gain_table(task)}\n\n{price_table(task)}" for task in results.measured]
    return "\n\n".join(
        [
            "# Who gains most at the same price?",
            FRONTIER_INTRO,
            f"![Reward gained against diversity lost, by task]({where}/{results.name}-tasks.png)",
            "## Over all tasks",
            *comparison_tables(results),
            COMPARED,
            "## Price of a gain",
            PRICES,
            *tables,
        ]
    )


def frontier_family(results: StudyResults) -> dict[tuple[str, str], tuple[PairedDifference, float]]:
    """Every method against native PPO and against PCPO, with p-values corrected as one family."""
    references = [results.study.baseline, OURS]
    keys = [
        (name, reference)
        for number, reference in enumerate(references)
        for name in results.methods
        if name not in references[: number + 1] and reference in results.methods
    ]
    compared = {key: paired_difference(results, *key) for key in keys}
    p = corrected_p_values((key, one.differences) for key, one in compared.items())
    return {key: (one, p[key]) for key, one in compared.items()}


def comparison_tables(results: StudyResults) -> list[str]:
    """A table per reference; a comparison that no task has finished yet has dashes."""
    family = frontier_family(results)
    tables = []
    for reference in dict.fromkeys(reference for _, reference in family):
        model = mixed_model(results, reference)
        rows = []
        for name in (name for name, other in family if other == reference):
            compared, p = family[name, reference]
            by_model = [format_interval(model.effects[name]), format_p_value(model.p[name])]
            by_seeds = [format_interval(compared.interval), format_p_value(p), compared.better_in]
            rows.append([STUDY_METHODS[name].title, *by_model, *by_seeds, times_cheaper(results, name, reference)])
        head = [f"against {STUDY_METHODS[reference].title}", "difference (mixed model)", "p", "difference (by seeds)"]
        tables.append(markdown_table([*head, "p (Holm)", "better in", "model evaluations saved"], rows))
    return tables


def gain_table(task: TaskResults) -> str:
    """Gains within both limits, at each of them and at the end, and what is left at the end."""
    measures: tuple[tuple[Callable[[CellRun], float], int], ...] = (
        (lambda run: run.gain, 2),
        (lambda run: at_lost_diversity(run.rows, run.gains), 2),
        (lambda run: at_distance(run.rows, run.gains), 2),
        (lambda run: run.gains[-1], 2),
        (lambda run: 100 * (1 - lost_diversity(run.rows)[-1]), 0),
        (lambda run: distance(run.rows)[-1], 1),
        (lambda run: 100 * run.rows[-1]["right"], 0),
    )
    rows = []
    for name in task.measured:
        runs = task.runs[name]
        numbers = [format_interval(t_interval([of(run) for run in runs]), digits) for of, digits in measures]
        rows.append([STUDY_METHODS[name].title, task.chosen[name].title, str(len(runs)), *numbers])
    head = ["", "learning rate, KL weight", "seeds", "gain within the limits", "at 10 % less diversity"]
    head += [f"at {FAR:g} x the distance", "at the end", "diversity left, %", "distance, x", "correct images, %"]
    return markdown_table(head, rows)


def price_table(task: TaskResults) -> str:
    """Model evaluations to each goal, and images and CPU seconds to the one of the summary."""
    evaluations: list[tuple[float, Price]] = [(goal, "model_evaluations") for goal in GOALS]
    columns: list[tuple[float, Price]] = [*evaluations, (GOAL, "images"), (GOAL, "cpu_seconds")]
    rows = []
    for name in task.measured:
        cells = []
        for goal, of in columns:
            prices = [run.price(goal, of) for run in task.runs[name]]
            reached = f"({int(np.isfinite(prices).sum())}/{len(prices)})"
            cells.append(f"{format_interval(bootstrap(prices, median), 0)} {reached}")
        rows.append([STUDY_METHODS[name].title, *cells])
    return markdown_table(["", *(f"{UNITS[of]} to +{goal:g}" for goal, of in columns)], rows)


def summary_table(results: StudyResults) -> str:
    """One row per method, over the same tasks for all: gains, the comparison with native PPO, TinyEval."""
    baseline, family = results.study.baseline, frontier_family(results)
    cheapest = {task.task: cheapest_run(task) for task in results.measured}
    rows = []
    for name in results.methods:
        runs = [run for task in results.comparable(name) for run in task.runs[name]]
        compared = ["-"] * 2
        if (name, baseline) in family:
            one, p = family[name, baseline]
            compared = [format_interval(one.interval), format_p_value(p)]
        following = mean_change(results, name)
        gains = ["-", "-"]
        if runs:
            early = [run.gain_at(cheapest[run.task]) for run in runs]
            gains = [format_number(sum(values) / len(values)) for values in ([run.gain for run in runs], early)]
        reached = f"{sum(np.isfinite(run.price(GOAL)) for run in runs)} of {len(runs)}"
        title, count = STUDY_METHODS[name].title, f"{len(runs)} of {planned(results, name)}"
        rows.append([title, count, *gains, *compared, reached, following])
    head = ["method", "runs", "gain within the limits", "at one price", "more than native PPO", "p (Holm)"]
    return markdown_table([*head, f"reaches +{GOAL:g}", "TinyEval, change"], rows)


def cheapest_run(task: TaskResults) -> float:
    """Model evaluations of the task's cheapest run, the price that every run has paid at some time."""
    return min(run.rows[-1]["model_evaluations"] for runs in task.runs.values() for run in runs)


def planned(results: StudyResults, name: str) -> int:
    """The number of a method's reported runs when the study is finished."""
    return len(results.study.seeds) * sum(name in task.runs for task in results.tasks)
