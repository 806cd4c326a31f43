"""The page on reward gained per model evaluation."""

from collections.abc import Callable, Sequence

from ..study.methods import STUDY_METHODS
from ..study.statistics import t_interval
from .collect import CellRun, TaskResults
from .markdown import format_interval, format_number, markdown_table

INTRO = """A model evaluation is one latent predicted once, in a rollout or in a gradient step; the measured KL and the
evaluations of the study are not counted. A gradient step's evaluation costs about three times the time of a rollout's.
Gains are those after the last update, in standard deviations of the base model's rewards, means over the seeds with
Student's 95 % interval; kept gains are those of the last evaluation that kept the objects. All methods have the same
seeds, prompts, learning rate and clip range."""


def evaluations_page(results: Sequence[TaskResults]) -> str:
    """Both tables; empty where the records do not count model evaluations."""
    runs = [run for task in results for own in task.runs.values() for run in own]
    if not runs or not all(run.model_evaluations for run in runs):
        return ""
    per_thousand = "\n\n".join(
        f"## {title}\n\n{_gain_table(results, of)}"
        for title, of in (
            ("Gain per 1,000 model evaluations", lambda run: run.gains[-1]),
            ("Kept gain per 1,000 model evaluations", lambda run: run.kept[-1]),
        )
    )
    return f"# Reward gained per model evaluation\n\n{INTRO}\n\n{per_thousand}\n\n## Costs\n\n{_cost_table(results)}"


def _gain_table(results: Sequence[TaskResults], gain: Callable[[CellRun], float]) -> str:
    rows = []
    for name in _methods(results):
        cells = [
            format_interval(t_interval([1000 * gain(run) / run.model_evaluations for run in task.runs.get(name, ())]))
            for task in results
        ]
        rows.append([STUDY_METHODS[name].title, *cells])
    return markdown_table(["", *(_short_title(task) for task in results)], rows)


def _cost_table(results: Sequence[TaskResults]) -> str:
    """What an update costs, and what the images lost, means over all tasks and seeds."""
    rows = []
    for name in _methods(results):
        runs = [run for task in results for run in task.runs.get(name, ())]

        def mean(of: Callable[[CellRun], float], digits: int, runs: list[CellRun] = runs) -> str:
            return format_number(sum(map(of, runs)) / len(runs), digits)

        rows.append(
            [
                STUDY_METHODS[name].title,
                str(len(runs)),
                mean(lambda run: run.model_evaluations / len(run.records), 0),
                mean(lambda run: run.result["seconds_per_update"], 2),
                mean(lambda run: run.gains[-1], 2),
                mean(lambda run: run.kept[-1], 2),
                mean(lambda run: 100 * run.share, 0),
                mean(lambda run: run.evaluated("diversity")[-1] / run.evaluated("diversity")[0], 2),
            ]
        )
    head = ["", "runs", "evaluations per update", "seconds per update", "final gain", "final kept gain"]
    return markdown_table([*head, "objects kept, %", "diversity, of the base model's"], rows)


def _methods(results: Sequence[TaskResults]) -> list[str]:
    return list(dict.fromkeys(name for task in results for name in task.runs))


def _short_title(task: TaskResults) -> str:
    return f"{task.task.recipe}, {task.task.reward}"
