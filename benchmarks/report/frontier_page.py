"""The page on who gains most at the same price."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np

from ..study.methods import OURS, STUDY_METHODS
from ..study.outcome import FAR, GOAL, GOALS, Price, at_distance, at_lost_diversity, distance, lost_diversity
from ..study.statistics import bootstrap, median, t_interval
from .collect import CellRun, StudyResults, TaskResults, by_step
from .comparison import PairedDifference, corrected_p_values, mixed_model, paired_difference, times_cheaper
from .frontier_figure import task_figure
from .markdown import format_interval, format_number, format_p_value, markdown_table
from .prompts_page import mean_change

FRONTIER_INTRO = f"""Every method has the setting that the tuning seeds chose for it ([tuning](tuning.md)). Compared
is the gain in reward within limits: at which diversity has fallen by 10 % or the tiny FD to the base model is
{FAR:g} times what new noise alone gives, whichever comes first, in standard deviations of the base model's rewards.
A run that reaches neither counts with its last gain."""
COMPARED = f"""\
"Difference (mixed model)": an effect of each method and of each task, random intercepts for each seed of each task,
REML, all finished runs. It takes the tasks of a seed as independent, so its intervals are the narrower ones; its
p-values are not corrected. "Difference (by seeds)": the mean over the tasks that both methods and the whole first wave
have finished, Student's t over seeds. Its p-values are corrected by Holm's method in two families: the first wave
against native PPO, and all other comparisons, which grow in number with every further method that finishes. Both
columns generalise to new seeds, not to other tasks. "Model evaluations saved": how many times the model evaluations
the reference needs to a gain of {GOAL:g}, median [95 %, bootstrap over seeds] over the pairs of seed and task in which
one of the two reaches it. A reference that does not reach it counts with all that its run spends, so the number depends
on how long the runs are, and rows with other pairs cannot be compared."""
CLIPPED = """\
Terms of the objective that are clipped, %, means over updates, steps and seeds; at most 50 %, since the first of the
two optimizer steps of an update starts from a ratio of 1. DiffusionNFT clips nothing."""
REFERENCES = (OURS, "nft")  # that further tables compare with
PRICES = """\
Spent until the gain is reached, if it is reached within the limits: median over seeds [95 %, bootstrap], and how many
seeds reach it. Model evaluations are latents predicted once, in a rollout or in a gradient step, the KL's included;
between evaluations, and before the first one, a straight line is assumed. CPU seconds are of the process, of
rollouts, rewards and updates."""
Measures = dict[str, tuple[Callable[[CellRun], float], int]]  # title of a column -> (of a run, digits)
UNITS: dict[Price, str] = {"model_evaluations": "model evaluations", "images": "images", "cpu_seconds": "CPU seconds"}


def frontier_page(results: StudyResults, images: Path, where: str) -> str:
    """The page as Markdown; its figure is saved in `images`, which the page refers to as `where`."""
    task_figure(results).save(images / f"{results.name}-tasks.png")
    tables = [
        "\n\n".join([f"## {task.task.title}", gain_table(task), ending_table(task), price_table(task)])
        for task in results.measured
    ]
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
            "## Clipped terms",
            CLIPPED,
            clip_table(results),
        ]
    )


def frontier_family(results: StudyResults) -> dict[tuple[str, str], tuple[PairedDifference, float]]:
    """Every method against native PPO, PCPO and DiffusionNFT, with corrected p-values.

    The first wave against native PPO is one family of tests, all other comparisons are another.
    """
    study = results.study
    references = [study.baseline, *REFERENCES]
    compared = {
        (name, reference): paired_difference(results, name, reference)
        for number, reference in enumerate(references)
        for name in results.methods
        if name not in references[: number + 1] and reference in results.methods
    }
    first = [(name, reference) for name, reference in compared if reference == study.baseline and name in study.methods]
    p: dict[tuple[str, str], float] = {}
    for family in (first, [key for key in compared if key not in first]):
        p |= corrected_p_values((key, compared[key].differences) for key in family)
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
    """Gains within both limits, also at the price of the cheapest run, at each limit and at the end."""
    price = cheapest_run(task)
    measures: Measures = {
        "gain within the limits": (lambda run: run.gain, 2),
        f"after {price} model evaluations": (lambda run: run.gain_at(price), 2),
        "at 10 % less diversity": (lambda run: at_lost_diversity(run.rows, run.gains), 2),
        f"at {FAR:g} x the distance": (lambda run: at_distance(run.rows, run.gains), 2),
        "at the end": (lambda run: run.gains[-1], 2),
    }
    before = {name: [task.chosen[name].title, str(len(task.runs[name]))] for name in task.measured}
    return _measures_table(task, measures, ["learning rate, KL weight", "seeds"], before)


def ending_table(task: TaskResults) -> str:
    """What is left of the images at the end of training."""
    measures: Measures = {
        "diversity left at the end, %": (lambda run: 100 * (1 - lost_diversity(run.rows)[-1]), 0),
        "distance, x": (lambda run: distance(run.rows)[-1], 1),
        "correct images, %": (lambda run: 100 * run.rows[-1]["right"], 0),
    }
    return _measures_table(task, measures)


def _measures_table(
    task: TaskResults,
    measures: Measures,
    head: Sequence[str] = (),
    before: Mapping[str, list[str]] = MappingProxyType({}),
) -> str:
    """A row per method: the columns `before`, and means with their intervals."""
    rows = []
    for name in task.measured:
        columns = [
            format_interval(t_interval([of(run) for run in task.runs[name]]), digits)
            for of, digits in measures.values()
        ]
        rows.append([STUDY_METHODS[name].title, *before.get(name, []), *columns])
    return markdown_table(["", *head, *measures], rows)


def clip_table(results: StudyResults) -> str:
    """The share of clipped terms, by task and method."""
    names = [name for name in results.methods if STUDY_METHODS[name].clips]
    rows = []
    for task in results.measured:
        shares = [by_step(task.runs[name], "clip_fraction")[1] if task.runs.get(name) else [] for name in names]
        rows.append([task.task.name, *(f"{100 * np.mean(own):.1f}" if len(own) else "-" for own in shares)])
    return markdown_table(["", *(STUDY_METHODS[name].title for name in names)], rows)


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


def cheapest_run(task: TaskResults) -> int:
    """Model evaluations of the task's cheapest run, the price that every run has paid at some time."""
    return min(run.rows[-1]["model_evaluations"] for runs in task.runs.values() for run in runs)


def planned(results: StudyResults, name: str) -> int:
    """The number of a method's reported runs when the study is finished."""
    return len(results.study.seeds) * sum(name in task.runs for task in results.tasks)
