"""The page on who gains most at the same price."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ..markdown import format_interval, format_number, format_p_value, markdown_table
from ..study.methods import OURS, STUDY_METHODS
from ..study.outcome import (
    GOAL,
    GOALS,
    LIMITS,
    OTHER_LIMITS,
    Limits,
    Price,
    at_distance,
    at_lost_diversity,
    distance,
    lost_diversity,
)
from ..study.statistics import bootstrap, median, t_interval
from .collect import CellRun, StudyResults, TaskResults, by_step
from .comparison import (
    PairedDifference,
    corrected_p_values,
    difference_within,
    means_by_seed,
    mixed_model,
    paired_difference,
)
from .frontier_figure import COSTS, cost_figure
from .one_price import UNITS, cheapest_run

FRONTIER_INTRO = f"""Every method has the setting that the tuning seeds chose for it ([tuning](tuning.md)). Compared
is the gain within limits, in standard deviations of the base model's rewards: the gain when diversity has fallen by
{LIMITS.lost_share} or the distance to the base model is {LIMITS.far:g} times that of the base model's own images,
whichever comes first. A run that reaches neither counts with its last gain. Trained on colorfulness, all methods make
equally many updates, which cost them up to six times as many model evaluations; trained on tinyeval, as many updates as
cost about the same. Comparisons at one price are given beside those of whole runs."""
COMPARED = """\
"Difference": the mean over the tasks that both methods and the whole first wave have finished, with Student's t over
seeds. The p-values of the three tables are corrected by Holm's method as one family. "At one price": the same
difference when both have made as many model evaluations as the task's cheapest run of the first wave; a method whose
first evaluation comes later is on a straight line from the base model to it there. "Mixed model":
an effect of each method and of each task, random intercepts for each seed of each task, REML, all finished runs; it
assumes that a method gains the same in every task and varies as much as any other, which they do not, and its p-values
are not corrected. All of them generalise to new seeds, not to other tasks."""
RUN_COSTS = """\
Model evaluations of a run, means over seeds; in brackets, those before its first evaluation."""
BY_REWARD = """\
Gain over the tasks of each reward, and the difference to DiffusionNFT, of the methods that exist on both models and
have finished every task that the first wave has. p-values are corrected by Holm's method over this table."""
BY_TASK = """\
Gain within limits of every finished run; GRPO-Guard and TempFlow-GRPO exist on the flow model only."""
PARTS = """\
What PCPO's objective with its credit and what a branch of 1 add, each alone and on top of the other: differences of
runs with the same seed, with Student's t over seeds, not corrected."""
SENSITIVITY = """\
Mean gain over the tasks with other limits of diversity and distance. Settings were chosen for the middle ones."""
PRICES = """\
Spent until the gain is reached, if it is reached within the limits: median over seeds [95 %, bootstrap], and how many
seeds reach it. Model evaluations are predictions of the model, counted per latent, in rollouts and in gradient steps,
the KL's included; a gradient step's counts as one although it takes longer. CPU seconds are CPU time of the process,
in rollouts, rewards and updates; equal runs at other times differ in them by up to a third. Between evaluations, and
before the first one, a straight line is assumed."""
CLIPPED = """\
Terms of the objective that are clipped, %: means over updates, seeds and steps, and in brackets the step with the
most. At most 50 %, since the first of the two optimizer steps of an update starts from a ratio of 1. DiffusionNFT
clips nothing."""
WITHOUT_SIGNAL = """\
Updates in which every image has an advantage of 0 because the images of each group score alike: means over runs.
Such an update costs as much as any other and has no gradient but that of the KL."""
NFT = "nft"
ADDITIONS = {  # title of a column -> the method that has the part, and the one without it
    "PCPO - native PPO": ("pcpo", "ppo"),
    "the same, both with a branch": ("pcpo-branch-1", "ppo-branch-1"),
    "native PPO: branch - none": ("ppo-branch-1", "ppo"),
    "PCPO: branch - none": ("pcpo-branch-1", "pcpo"),
}
REFERENCES = (OURS, NFT)  # that further tables compare with
Columns = dict[str, tuple[Callable[[CellRun], float], int]]  # title of a column -> (of a run, digits)


def frontier_page(results: StudyResults, images: Path, where: str) -> str:
    """The page as Markdown; its figures are saved in `images`, which the page refers to as `where`."""
    figures = []
    for cost in COSTS:
        file = f"{results.name}-{cost.file}.png"
        cost_figure(results, cost).save(images / file)
        figures.append(f"![Reward gained against {cost.name}, by task]({where}/{file})")
    tables = [
        part
        for task in results.measured
        for part in (
            f"## {task.task.title}",
            gain_table(task),
            price_gain_table(results, task),
            ending_table(task),
            price_table(task),
        )
    ]
    return "\n\n".join(
        [
            "# Who gains most at the same price?",
            FRONTIER_INTRO,
            *figures,
            "## Over the tasks",
            *comparison_tables(results),
            COMPARED,
            "## What a run costs",
            RUN_COSTS,
            run_cost_table(results),
            "## By reward",
            BY_REWARD,
            reward_table(results),
            "## By task",
            BY_TASK,
            gains_by_task_table(results),
            *additions_section(results),
            "## Other limits",
            SENSITIVITY,
            sensitivity_table(results),
            "## Price of a gain",
            PRICES,
            *tables,
            "## Clipped terms",
            CLIPPED,
            clip_table(results),
            "## Updates without a signal",
            WITHOUT_SIGNAL,
            signal_table(results),
        ]
    )


def frontier_family(results: StudyResults) -> dict[tuple[str, str], tuple[PairedDifference, float]]:
    """Every method against native PPO, PCPO and DiffusionNFT, with p-values of one family."""
    references = [results.study.baseline, *REFERENCES]
    compared = {
        (name, reference): paired_difference(results, name, reference)
        for number, reference in enumerate(references)
        for name in results.methods
        if name not in references[: number + 1] and reference in results.methods
    }
    p = corrected_p_values({key: one.differences for key, one in compared.items()})
    return {key: (one, p[key]) for key, one in compared.items()}


def comparison_tables(results: StudyResults) -> list[str]:
    """A table per reference; a comparison that no task has finished yet has dashes."""
    family = frontier_family(results)
    prices = {task.task: cheapest_run(results, task) for task in results.measured}
    tables = []
    for reference in dict.fromkeys(reference for _, reference in family):
        model = mixed_model(results, reference)
        rows = []
        for name in (name for name, other in family if other == reference):
            compared, p = family[name, reference]
            early = paired_difference(results, name, reference, lambda run: run.gain_at(prices[run.task]))
            tasks = str(len(results.comparable(name, reference)))
            by_seeds = [format_interval(compared.interval), format_p_value(p), compared.better_in, tasks]
            by_model = [format_interval(model.effects[name]), format_p_value(model.p[name])]
            rows.append([STUDY_METHODS[name].title, *by_seeds, format_interval(early.interval), *by_model])
        head = ["difference", "p (Holm)", "better in", "tasks", "at one price", "mixed model", "p"]
        tables.append(markdown_table([f"against {STUDY_METHODS[reference].title}", *head], rows))
    return tables


def run_cost_table(results: StudyResults) -> str:
    """Model evaluations of a whole run and up to its first evaluation, by task."""
    rows = []
    for name in results.methods:
        every = (task.runs.get(name, ()) for task in results.measured)
        spent = ([[run.rows[k]["model_evaluations"] for run in runs] for k in (-1, 1)] for runs in every)
        cells = (f"{np.mean(whole):.0f} ({np.mean(first):.0f})" if whole else "-" for whole, first in spent)
        rows.append([STUDY_METHODS[name].title, *cells])
    return markdown_table(["", *(task.task.name for task in results.measured)], rows)


def reward_table(results: StudyResults) -> str:
    """Gain by reward over comparable tasks, and the difference to DiffusionNFT."""
    rewards = list(dict.fromkeys(task.task.reward for task in results.measured))
    names = [name for name in results.general if results.comparable(name)]
    against = {
        (name, reward): paired_difference(results, name, NFT, reward=reward)
        for name in names
        for reward in rewards
        if name != NFT
    }
    p = corrected_p_values({key: one.differences for key, one in against.items()})
    rows = []
    for name in names:
        row = [STUDY_METHODS[name].title]
        for reward in rewards:
            row.append(format_interval(t_interval(means_by_seed(results, name, reward))))
            one = against.get((name, reward))
            row += ["-"] * 2 if one is None else [format_interval(one.interval), format_p_value(p[name, reward])]
        rows.append(row)
    head = [title for reward in rewards for title in (f"{reward}: gain", "against DiffusionNFT", "p (Holm)")]
    return markdown_table(["", *head], rows)


def gains_by_task_table(results: StudyResults) -> str:
    """The gain of every method in every task; a dash where it does not exist or has no finished run."""
    rows = []
    for name in results.methods:
        gains = ([run.gain for run in task.runs.get(name, ())] for task in results.measured)
        rows.append([STUDY_METHODS[name].title, *(format_interval(t_interval(own)) for own in gains)])
    return markdown_table(["", *(task.task.name for task in results.measured)], rows)


def additions_section(results: StudyResults) -> list[str]:
    """What objective and branches add to the gain in each task in which all their combinations are finished."""
    tasks = results.finished(*{name for pair in ADDITIONS.values() for name in pair})
    if not tasks:
        return []
    rows = []
    for title, some in [*((task.task.name, [task]) for task in tasks), ("mean", tasks)]:
        added = (difference_within(some, *pair) for pair in ADDITIONS.values())
        rows.append([title, *(format_interval(one.interval) for one in added)])
    return ["## Objective and branches apart", PARTS, markdown_table(["", *ADDITIONS], rows)]


def sensitivity_table(results: StudyResults) -> str:
    """Mean gains over comparable tasks for several limits."""
    every = sorted((LIMITS, *OTHER_LIMITS))
    rows = []
    for name in (name for name in results.general if results.comparable(name)):
        runs = [run for task in results.comparable(name) for run in task.runs[name]]
        means = (sum(run.gain_within(limits) for run in runs) / len(runs) for limits in every)
        rows.append([STUDY_METHODS[name].title, *map(format_number, means)])
    return markdown_table(["", *(_limits_title(limits) for limits in every)], rows)


def _limits_title(limits: Limits) -> str:
    return f"{limits.lost_share} of diversity, {limits.far:g} x the distance"


def gain_table(task: TaskResults) -> str:
    """Gains within both limits, at each limit and at the end."""
    columns: Columns = {
        "gain within the limits": (lambda run: run.gain, 2),
        f"at {LIMITS.lost_share} less diversity": (lambda run: at_lost_diversity(run.rows, run.gains), 2),
        f"at {LIMITS.far:g} x the distance": (lambda run: at_distance(run.rows, run.gains), 2),
        "at the end": (lambda run: run.gains[-1], 2),
    }
    rows = [
        [STUDY_METHODS[name].title, task.chosen[name].title, str(len(runs)), *_means(runs, columns)]
        for name, runs in ((name, task.runs[name]) for name in task.measured)
    ]
    return markdown_table(["", "learning rate, KL weight", "seeds", *columns], rows)


def price_gain_table(results: StudyResults, task: TaskResults) -> str:
    """Gains within the limits at the price of the task's cheapest run, by what is paid."""
    columns: Columns = {}
    for of, unit in UNITS.items():
        spent = cheapest_run(results, task, of)
        columns[f"gain after {spent:.0f} {unit}"] = (lambda run, spent=spent, of=of: run.gain_at(spent, of), 2)
    return _means_table(task, columns)


def ending_table(task: TaskResults) -> str:
    """Diversity, distance and correct images at the end of training."""
    columns: Columns = {
        "diversity left at the end, %": (lambda run: 100 * (1 - lost_diversity(run.rows)[-1]), 0),
        "distance, x": (lambda run: distance(run.rows)[-1], 1),
        "correct images, %": (lambda run: 100 * run.rows[-1]["right"], 0),
    }
    return _means_table(task, columns)


def _means_table(task: TaskResults, columns: Columns) -> str:
    rows = [[STUDY_METHODS[name].title, *_means(task.runs[name], columns)] for name in task.measured]
    return markdown_table(["", *columns], rows)


def _means(runs: Sequence[CellRun], columns: Columns) -> list[str]:
    """Means of the columns with their intervals over seeds."""
    return [format_interval(t_interval([of(run) for run in runs]), digits) for of, digits in columns.values()]


def clip_table(results: StudyResults) -> str:
    """The share of clipped terms, by task and method."""
    names = [name for name in results.methods if STUDY_METHODS[name].clips]
    rows = []
    for task in results.measured:
        shares = [by_step(task.runs[name], "clip_fraction")[1] if task.runs.get(name) else [] for name in names]
        cells = (f"{100 * np.nanmean(own):.1f} ({100 * np.nanmax(own):.1f})" if len(own) else "-" for own in shares)
        rows.append([task.task.name, *cells])
    return markdown_table(["", *(STUDY_METHODS[name].title for name in names)], rows)


def signal_table(results: StudyResults) -> str:
    """The share of updates without an advantage, by task and method; a dash without runs."""
    rows = []
    for name in results.methods:
        every = ([run.without_signal for run in task.runs.get(name, ())] for task in results.measured)
        means = (100 * sum(shares) / len(shares) if shares else math.nan for shares in every)
        rows.append([STUDY_METHODS[name].title, *("-" if math.isnan(mean) else f"{mean:.0f} %" for mean in means)])
    return markdown_table(["", *(task.task.name for task in results.measured)], rows)


def price_table(task: TaskResults) -> str:
    """Model evaluations to each goal, and images and CPU seconds to the middle one."""
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
