"""The page on the guard: what a run ends with, with and without it, on rewards that are easily hacked."""

from collections.abc import Callable

from ..study.methods import STUDY_METHODS
from ..study.outcome import distance, gain, lost_diversity, tinyeval_curve
from ..study.statistics import t_interval
from .collect import CellRun, StudyResults, TaskResults
from .comparison import corrected_p_values
from .markdown import format_interval, format_number, format_p_value, markdown_table

GUARD_INTRO = """\
The guard only measures until it stops a run, so one run that goes on shows both outcomes: "with" is the update that
the guard keeps, "without" the last one. Where no update is within its limits, it keeps the base model; it stops a run
that leaves them {patience} times in a row. It watches the held-out rewards {held_out} and diversity, on prompts of
the training and with its default tolerance of {tolerance:g}; the tables show what the study measures, from other
noise. Losses are in standard deviations of the base model's scores. p-values test the difference that the guard
makes, and are corrected by Holm's method over the page."""

MEASURES: dict[str, tuple[int, Callable[[CellRun, int], float]]] = {  # title -> (digits, of a run's evaluation)
    "gain in the reward": (2, lambda run, k: run.gains[k]),
    "diversity left, %": (0, lambda run, k: 100 * (1 - lost_diversity(run.rows)[k])),
    "distance, x": (1, lambda run, k: distance(run.rows)[k]),
    "correct images, %": (0, lambda run, k: 100 * run.rows[k]["right"]),
    "TinyEval, hard tasks, %": (0, lambda run, k: 100 * tinyeval_curve(run.rows)[k]),
}


def kept_evaluation(run: CellRun) -> int:
    """The evaluation of the update that the guard keeps; 0, the base model's, if it keeps none."""
    kept = run.result["guard"]["kept"] or 0
    return [row["update"] for row in run.rows].index(kept)


def worst_loss(run: CellRun, k: int) -> float:
    """The largest loss of what the guard watches: standard deviations of a held-out reward, share of diversity."""
    config = run.result["config"]
    lost = [-gain(run.rows[k], run.rows[0], reward) for reward in config["reward"]["held_out"]]
    return max(*lost, lost_diversity(run.rows)[k])


def within(run: CellRun, k: int) -> bool:
    return worst_loss(run, k) <= run.result["config"]["guard"]["tolerance"]


def guards_share(run: CellRun) -> float:
    """The guard's share of the model evaluations up to the update at which it stops the run, or to the last one."""
    guard, stopped = run.result["guard"], run.result["guard"]["stopped"]
    row = run.rows[-1] if stopped is None else next(row for row in run.rows if row["update"] >= stopped)
    return guard["model_evaluations"] / (guard["model_evaluations"] + row["model_evaluations"])


def guard_page(results: StudyResults) -> str:
    runs = [run for task in results.measured for name in task.measured for run in task.runs[name]]
    guard = runs[0].result["config"]["guard"]
    limits = {key: guard[key] for key in ("tolerance", "patience")}
    intro = GUARD_INTRO.format(held_out=" and ".join(results.study.held_out), **limits)
    family = corrected_p_values(
        ((task.task.name, name, title), _differences(task.runs[name], title))
        for task in results.measured
        for name in task.measured
        for title in MEASURES
    )
    tables = [f"## Reward {task.task.reward}\n\n{outcome_table(task, family)}" for task in results.measured]
    return "\n\n".join(["# Does the guard stay within its limits?", intro, promise_table(results), *tables])


def promise_table(results: StudyResults) -> str:
    """By task and method: how many runs the guard stops, and how many are within its limits with and without it."""
    rows = []
    for task in results.measured:
        for name in task.measured:
            runs = task.runs[name]
            stopped = [run.result["guard"]["stopped"] for run in runs]
            kept = [run.rows[kept_evaluation(run)]["update"] for run in runs]
            inside = [sum(within(run, at(run)) for run in runs) for at in (kept_evaluation, _last)]
            share = sum(guards_share(run) for run in runs) / len(runs)
            rows.append(
                [
                    f"{task.task.reward}, {STUDY_METHODS[name].title}",
                    f"{sum(update is not None for update in stopped)} of {len(runs)}",
                    f"{format_number(sum(kept) / len(kept), 1)}",
                    *(f"{count} of {len(runs)}" for count in inside),
                    f"{100 * share:.0f} %",
                ]
            )
    head = ["reward, method", "stopped", "update kept, mean", "within the limits with", "without"]
    return markdown_table([*head, "model evaluations spent by the guard"], rows)


def outcome_table(task: TaskResults, p: dict[tuple[str, str, str], float]) -> str:
    rows = []
    for name in task.measured:
        runs = task.runs[name]
        for title, (digits, of) in MEASURES.items():
            sides = [
                format_interval(t_interval([of(run, at(run)) for run in runs]), digits)
                for at in (_last, kept_evaluation)
            ]
            base = format_number(sum(of(run, 0) for run in runs) / len(runs), digits)
            p_value = format_p_value(p[task.task.name, name, title])
            rows.append([f"{STUDY_METHODS[name].title}, {title}", str(len(runs)), base, *sides, p_value])
    return markdown_table(["", "seeds", "base model", "without the guard", "with it", "p (Holm)"], rows)


def _differences(runs: list[CellRun], title: str) -> list[float]:
    of = MEASURES[title][1]
    return [of(run, kept_evaluation(run)) - of(run, _last(run)) for run in runs]


def _last(run: CellRun) -> int:
    return len(run.rows) - 1
